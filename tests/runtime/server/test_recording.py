"""Served traffic becomes traces, and nothing about that can hurt the serving."""

import errno
import itertools
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from data.adapters import moe_layers
from data.schema import Trace
from data.store import TraceStore
from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.recording import Routed, TrafficRecorder, open_recording
from runtime.server.sampling import SamplingParams
from tests.families import tiny_model
from tests.runtime.server.fakes import (
    NOTHING,
    Captured,
    Listener,
    generate,
    samples,
    submit_one,
    wait_until,
)
from tests.runtime.server.faulty import kill

ROOT = Path(__file__).resolve().parents[3]
GREEDY = SamplingParams(temperature=0.0)


class Shelf:
    """Keeps what is appended in memory; breaks when it is told to."""

    def __init__(self) -> None:
        self.shards: list[list[Trace]] = []
        self.error: Exception | None = None
        self.is_closed = False

    def append(self, traces: Sequence[Trace]) -> None:
        if self.error is not None:
            raise self.error
        self.shards.append(list(traces))

    def close(self) -> None:
        self.is_closed = True

    def __len__(self) -> int:
        return sum(map(len, self.shards))


def routed(prompt: str = "what was asked") -> Routed:
    ids_TLK = np.zeros((4, 2, 1), np.uint8)
    return Routed([1, 2, 3, 4, 5], 3, prompt, ids_TLK, ids_TLK.astype(np.float16))


def record(model: Any, tokenizer: Any, path: Path, prompts: list[Any], **kwargs: Any) -> list[Any]:
    """Serve ``prompts`` at once while recording; the ids of each with its answer."""
    recorder = open_recording(path, model, model_id="tiny", prompts="keep", max_requests=1000)
    engine = GenerationEngine(model=model, tokenizer=tokenizer, recorder=recorder, **kwargs)
    engine.start()
    listeners = [Listener() for _ in prompts]
    for i, (ids, listener) in enumerate(zip(prompts, listeners, strict=True)):
        submit_one(
            engine, listener, prompt_ids=ids, max_tokens=3 + i, sampling=GREEDY, ignore_eos=True
        )
    answers = [[piece.token_id for piece in listener.until_end()] for listener in listeners]
    engine.shutdown()
    return [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("mode", ["single", "batched", "auto"])
def test_the_recorded_routing_is_what_the_model_does_with_these_tokens(
    model: Any, tokenizer: Any, tmp_path: Path, mode: str
) -> None:
    shared = tokenizer("The same long beginning of several requests, " * 4).input_ids
    prompts = [[*shared, 20, 30], [*shared, 40], [50, 60, 70], [80]]
    whole = record(model, tokenizer, tmp_path, prompts, mode=mode)
    store = TraceStore.open(tmp_path)
    traces = {tuple(trace.token_ids_P.tolist()): trace for trace in store}  # type: ignore[union-attr]
    assert traces.keys() == {tuple(ids) for ids in whole}
    for ids, prompt in zip(whole, prompts, strict=True):
        trace = traces[tuple(ids)]
        assert trace.num_prompt_tokens == len(prompt)
        assert trace.prompt == tokenizer.decode(prompt)
        expected_TLK = routing_of(model, ids[:-1])
        same = (np.sort(trace.topk_expert_ids_TLK, -1) == np.sort(expected_TLK, -1)).mean()
        assert trace.topk_expert_ids_TLK.shape == expected_TLK.shape
        assert same > 0.999  # float noise may swap two experts of nearly equal score
    assert all(not moe.router._forward_hooks for moe in moe_layers(model))


def routing_of(model: Any, ids: list[int]) -> Any:
    chosen: list[Any] = []
    handles = [
        moe.router.register_forward_hook(lambda router, args, output: chosen.append(output[2]))
        for moe in moe_layers(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, 1).numpy()


@pytest.mark.parametrize(
    ("prompts", "kept", "has_ids"),
    [("omit", None, False), ("hash", "hash", False), ("keep", "what was asked", True)],
)
def test_prompts_are_kept_as_asked_and_ids_only_with_them(
    prompts: Any, kept: str | None, has_ids: bool
) -> None:
    shelf = Shelf()
    recorder = TrafficRecorder(shelf, prompts=prompts)
    for prompt in ("what was asked", "what was asked", "another"):
        recorder.add(routed(prompt))
    recorder.close()
    recorder.close()
    ((first, second, third),) = shelf.shards
    assert (first.token_ids_P is not None) == has_ids
    assert first.prompt == second.prompt
    if kept == "hash":
        assert first.prompt is not None
        assert len(first.prompt) == 64
        assert first.prompt != third.prompt
    else:
        assert first.prompt == kept
    assert len({first.request_id, second.request_id, third.request_id}) == 3
    assert shelf.is_closed


def test_a_full_disk_ends_the_recording_and_not_the_serving(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    recorder = TrafficRecorder(shelf)
    engine = GenerationEngine(model=model, tokenizer=tokenizer, recorder=recorder, mode="batched")
    with TestClient(create_app(engine, model_name="tiny")) as client:
        wait_until(lambda: engine.state == "ready")
        shelf.error = OSError(errno.ENOSPC, "No space left on device")
        for _ in range(33):
            generate(engine, [20, 30], max_tokens=2)
        wait_until(lambda: not recorder.is_active)
        assert len(generate(engine, [20, 30], max_tokens=3, ignore_eos=True)[0]) == 3
        wait_until(lambda: samples(client)["moecast_record_dropped_requests_total"] >= 33)
        found = samples(client)
        assert found["moecast_record_active"] == 0
        assert found["moecast_recorded_requests_total"] == 0
        assert client.get("/health").status_code == 200
    assert "No space left on device" in caplog.text
    assert shelf.shards == []


def test_a_request_that_cannot_be_a_trace_ends_the_recording_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shelf = Shelf()
    recorder = TrafficRecorder(shelf, prompts="hash")
    recorder.add(routed("as it should be"))
    recorder.add(routed("half a character: \ud800"))  # no UTF-8 for this
    wait_until(lambda: not recorder.is_active)
    recorder.add(routed("too late"))
    recorder.close()
    assert (len(shelf), recorder.num_recorded, recorder.num_dropped) == (1, 1, 2)
    assert shelf.is_closed
    assert "Recording ends" in caplog.text


def test_a_killed_thread_ends_the_recording_and_every_request_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shelf = Shelf()
    recorder = TrafficRecorder(shelf)
    recorder.add(routed("that waits for others"))
    wait_until(lambda: len(recorder._shard) == 1)
    kill(recorder._thread)
    recorder.add(routed("that wakes the thread"))
    wait_until(lambda: not recorder.is_active)
    recorder.add(routed("too late"))
    recorder.close()
    assert (len(shelf), recorder.num_recorded, recorder.num_dropped) == (0, 0, 3)
    assert shelf.is_closed
    assert "Recording ends: its thread was broken off" in caplog.text


def test_captured_steps_wait_for_the_end_of_the_recording_and_that_is_told(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("qwen3_moe")
    model.generation_config.prefill_chunk_size = 7
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    offload, recorder = Captured(model), TrafficRecorder(Shelf(), max_requests=32)
    engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=offload, recorder=recorder)
    ask = {"max_tokens": 4, "ignore_eos": True, "sampling": GREEDY}
    with TestClient(create_app(engine, model_name="tiny")) as client:
        wait_until(lambda: engine.state == "ready")
        assert "Recording reads every router" in caplog.text
        said = [generate(engine, list(range(5, 25)), **ask)[0] for _ in range(32)]
        wait_until(lambda: not recorder.is_active)
        assert samples(client)["moecast_record_replaces_graphs"] == 0
        assert max(widths) == 7, "the prompts' chunks are those of the plan"
        assert offload.graph.add_to(NOTHING).graph_captures == 0
        said.append(generate(engine, list(range(5, 25)), **ask)[0])
        assert offload.graph.add_to(NOTHING).graph_captures == 1
        assert all(not moe.router._forward_hooks for moe in moe_layers(model))
        assert samples(client)["moecast_record_dropped_requests_total"] == 1
    assert all(ids == said[0] for ids in said)
    offload.graph.remove()


def test_the_metric_says_while_captured_steps_wait(tokenizer: Any) -> None:
    model = tiny_model("qwen3_moe")
    offload, recorder = Captured(model), TrafficRecorder(Shelf())
    engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=offload, recorder=recorder)
    with TestClient(create_app(engine, model_name="tiny")) as client:
        wait_until(lambda: engine.state == "ready")
        assert samples(client)["moecast_record_replaces_graphs"] == 1
    offload.graph.remove()


def test_a_store_takes_so_many_and_no_more() -> None:
    shelf = Shelf()
    recorder = TrafficRecorder(shelf, max_requests=3)
    for _ in range(5):
        recorder.add(routed())
    recorder.close()
    assert (len(shelf), recorder.num_recorded, recorder.num_dropped) == (3, 3, 2)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"prompts": "encrypt"}, "record_prompts='encrypt': must be one of"),
        ({"max_requests": 0}, "record_max_requests=0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TrafficRecorder(Shelf(), **wrong)


def test_a_predictor_is_trained_on_served_traffic(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The circle: served, recorded, learned from by the command that users give."""
    texts = [
        "The weather",
        "def add(a, b):",
        "Dear customer",
        "1 2 3",
        "In law",
        "Once upon a time",
    ]
    names = (uuid.UUID(int=number) for number in itertools.count())
    monkeypatch.setattr(uuid, "uuid4", lambda: next(names))  # so that the split is always the same
    prompts = [tokenizer(f"{text} {i}").input_ids for i in range(5) for text in texts]
    for part in (prompts[:20], prompts[20:]):  # the second server goes on with the store
        record(model, tokenizer, tmp_path / "traffic", part, mode="batched")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"source={tmp_path / 'traffic'}",
        "predictor=popularity",
        "logger=none",
        "evaluate.residencies=[0.5]",
        "evaluate.max_tokens=100",
        "evaluate.cost_tokens=16",
        f"paths.root={tmp_path / 'outputs'}",
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert Path(values["artifact"], "manifest.json").is_file()
    assert 0 < values["metrics"]["recall/lookahead_1"] < 1
