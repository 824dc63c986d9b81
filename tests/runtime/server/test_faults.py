"""What breaks in a running server is told, nothing is half-written, and the rest goes on.

Each test harms a server process from outside while it answers (`faulty`). What else can happen to
a recording, a batch or a store is told by their own tests.
"""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from data.adapters import spec_of
from data.store import TraceStore
from predictors.artifact import save_artifact
from predictors.popularity import Popularity
from tests.runtime.server.fakes import wait_until
from tests.runtime.server.processes import MODEL, ServerProcess

PROMPTS = ["The weather in", "def add(a, b):", "Dear customer", "1 + 1 =", "Once upon", "In law"]
GREEDY: dict[str, Any] = {
    "model": MODEL,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
Asked = Future[str | Exception]


@contextmanager
def faulty(folder: Path, harm: str, *overrides: str) -> Iterator[ServerProcess]:
    """A server that SIGUSR1 harms."""
    command = ("-m", "tests.runtime.server.faulty", harm)
    with ServerProcess(folder, ["serve.engine=batched", *overrides], command=command) as server:
        yield server


def answer(server: ServerProcess, prompt: str, max_tokens: int = 8) -> str | Exception:
    """The text of a streamed answer, or what the client raised instead of its end."""
    try:
        stream = server.client.completions.create(
            prompt=prompt, max_tokens=max_tokens, stream=True, **GREEDY
        )
        chunks = list(stream)
    except (openai.OpenAIError, httpx.HTTPError) as error:
        return error
    assert chunks[-1].choices[0].finish_reason == "length"
    return "".join(chunk.choices[0].text for chunk in chunks)


def expected(model: Any, tokenizer: Any, prompt: str, max_tokens: int = 8) -> str:
    """What the resident model says."""
    inputs = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, eos_token_id=None)[
        0, inputs.input_ids.shape[1] :
    ]
    text: str = tokenizer.decode(said, skip_special_tokens=True)
    return text


@contextmanager
def load(server: ServerProcess, max_tokens: int) -> Iterator[Sequence[Asked]]:
    """All prompts being answered at once; each has begun when this is entered."""

    def num_begun() -> float:
        ended = server.total("vllm:request_success_total") - before  # first: none counts twice
        return ended + server.metric("vllm:num_requests_running")

    before = server.total("vllm:request_success_total")
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [pool.submit(answer, server, prompt, max_tokens) for prompt in PROMPTS]
        wait_until(lambda: num_begun() == len(PROMPTS))
        yield asked


def test_a_killed_engine_thread_is_told_and_the_next_requests_are_answered(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    with faulty(tmp_path, "kill:generation", "policy=lru") as server:
        with load(server, max_tokens=1000) as asked:
            server.signal(signal.SIGUSR1)
            told = [str(one.result()) for one in asked]
        assert all("the engine was interrupted: SystemExit" in error for error in told)
        for prompt in PROMPTS:
            assert answer(server, prompt) == expected(model, tokenizer, prompt)
        assert server.is_healthy
        assert server.metric("moecast_engine_restarts_total") == 1
        assert "The engine's loop was broken off" in server.log
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_full_disk_ends_the_recording_and_what_was_written_is_whole(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    record, shard = tmp_path / "traffic", 32
    with faulty(tmp_path, "full", "policy=lru", f"serve.record={record}") as server:
        for number in range(shard):
            answer(server, f"{PROMPTS[0]} {number}", max_tokens=2)
        wait_until(lambda: server.metric("moecast_recorded_requests_total") == shard)
        before = {file.name: file.read_bytes() for file in record.iterdir()}
        server.signal(signal.SIGUSR1)
        for number in range(shard):
            answer(server, f"{PROMPTS[1]} {number}", max_tokens=2)
        wait_until(lambda: server.metric("moecast_record_active") == 0)
        for prompt in PROMPTS:
            assert answer(server, prompt) == expected(model, tokenizer, prompt)
        assert server.metric("moecast_record_dropped_requests_total") == shard + len(PROMPTS)
        assert server.metric("moecast_recorded_requests_total") == shard
        assert f"Recording ends: {shard} requests could not be written" in server.log
        assert "File too large" in server.log
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert {file.name: file.read_bytes() for file in record.iterdir()} == before
    assert len(TraceStore.open(record)) == shard


def export(folder: Path, model: Any, favourite: int) -> Path:
    """An artifact that expects one expert of each layer above all."""
    spec, predictor = spec_of(model), Popularity()
    shares_LE = torch.full((spec.num_layers, spec.num_experts), 0.1)
    shares_LE[:, favourite] = 0.9
    predictor.load_state(spec, {"popularity_LE": shares_LE})
    return save_artifact(predictor, folder, spec=spec, parents={})


def test_an_artifact_that_is_cut_while_it_is_served_is_refused_and_a_whole_one_takes_over(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    """And so it is after the thread that looks for artifacts was killed."""
    artifact = export(tmp_path / "served", model, 1)
    with faulty(tmp_path, "kill:artifact", f"artifact={artifact}") as server:
        with load(server, max_tokens=60) as asked:
            state = artifact / "state.safetensors"
            with state.open("wb") as cut:  # as a copy over it that was broken off
                cut.write(b"half of")
            server.signal(signal.SIGHUP)
            wait_until(lambda: server.metric("moecast_artifact_refusals_total") == 1)
            server.signal(signal.SIGUSR1)
            export(artifact, model, 5)
            server.signal(signal.SIGHUP)
            wait_until(lambda: server.metric("moecast_artifact_reloads_total") == 1)
            for prompt, one in zip(PROMPTS, asked, strict=True):
                assert one.result() == expected(model, tokenizer, prompt, 60)
        assert server.metric("moecast_expert_predictor_up") == 1
        assert server.metric("moecast_artifact_refusals_total") == 1
        assert "its SHA-256 is not the manifest's" in server.log
        assert "A look for artifacts was broken off" in server.log
        assert f"Artifact {artifact} serves now" in server.log
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("drain_s", [60, 0], ids=["in time", "too late"])
def test_sigterm_under_load_ends_with_all_answers_or_all_told(
    tmp_path: Path, model: Any, tokenizer: Any, drain_s: int
) -> None:
    record = tmp_path / "traffic"
    options = ["policy=lru", f"serve.drain_s={drain_s}", f"serve.record={record}"]
    max_tokens = 60 if drain_s else 1500
    with ServerProcess(tmp_path, ["serve.engine=batched", *options]) as server:
        with load(server, max_tokens) as asked:
            server.signal(signal.SIGTERM)
            said = [one.result() for one in asked]
        assert server.wait() == 0
        assert "runtime.server.run: Stopped" in server.log
    if drain_s:
        for prompt, text in zip(PROMPTS, said, strict=True):
            assert text == expected(model, tokenizer, prompt, max_tokens)
        assert len(TraceStore.open(record)) == len(PROMPTS)
    else:
        assert all("the server is shutting down" in str(error) for error in said)
        assert f"{len(PROMPTS)} requests are not answered after 0 s" in server.log
        assert server.log.count("generated, abort") == len(PROMPTS)
        assert list(record.iterdir()) == []
