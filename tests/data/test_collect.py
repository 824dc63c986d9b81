import dataclasses
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedModel

import data.files
from data.adapters import moe_layers
from data.collect import collect, store_name
from data.errors import NotAMoEError, OutputExistsError
from data.schema import Prompt, Trace
from data.sources import PromptSource
from data.store import CollectSettings, TraceStore
from tests.families import tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = CollectSettings(max_prompt_tokens=12, max_new_tokens=4, batch_size=2)
NUM_PROMPTS = 20  # ten batches of two, in three shards of four, four and two
SHARDS_LEFT = {"in a batch": 1, "in a shard": 1, "before the manifest": 3}  # by a kill there


class Letters:
    """A tokenizer: one token a character; token 1 begins every text, as with most real ones."""

    eos_token_id: int | None = None

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, *(ord(letter) for letter in text)])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token_id) for token_id in token_ids if token_id > 1)


class Sentences(PromptSource):
    """A source of prompts of different lengths."""

    def __init__(self, num_prompts: int = NUM_PROMPTS, text: str = "the quick brown fox") -> None:
        super().__init__(name="sentences", num_prompts=num_prompts)
        self._text = text

    def read(self) -> Iterator[Prompt]:
        for number in range(NUM_PROMPTS):
            text = self._text[number % 5 : 3 + 2 * (number % 7)]
            yield Prompt(request_id=f"s{number}", topic=f"t{number % 11}", text=text)


def collect_tiny(path: Path, **changes: Any) -> TraceStore:
    arguments: dict[str, Any] = {
        "model": tiny_model("qwen3_moe"),
        "tokenizer": Letters(),
        "source": Sentences(),
        "path": path,
        "model_id": "tiny",
        "settings": SETTINGS,
    }
    arguments |= changes
    first = [arguments.pop(name) for name in ("model", "tokenizer", "source", "path")]
    return collect(*first, **arguments)


def changed(**values: Any) -> CollectSettings:
    return dataclasses.replace(SETTINGS, **values)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def by_id(store: TraceStore) -> dict[str, Trace]:
    return {trace.request_id: trace for trace in store}


def run_plainly(
    model: PreTrainedModel, token_ids: npt.NDArray[np.int32]
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Logits, and what reached the experts: one forward without batch, padding or cache."""
    routed_TLK: list[torch.Tensor] = []
    handles = [
        moe.experts.register_forward_pre_hook(lambda _, given: routed_TLK.append(given[1]))
        for moe in moe_layers(model)
    ]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(token_ids[None].astype(np.int64))).logits
    for handle in handles:
        handle.remove()
    return logits, torch.stack(routed_TLK, dim=1).numpy()


def collect_until_killed(path: Path, moment: str) -> None:
    """Runs in a process of its own, and does not return."""
    calls = 0

    def kill_at(number: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    model = tiny_model("qwen3_moe")
    if moment == "in a batch":
        model.register_forward_pre_hook(lambda *_: kill_at(22))  # in the second shard
    else:
        fsync = os.fsync
        number = {"in a shard": 3, "before the manifest": 7}[moment]  # two a file: file and folder
        data.files.os.fsync = lambda handle: (kill_at(number), fsync(handle))[1]  # type: ignore
    collect_tiny(path, model=model)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a collection killed at each moment leaves behind.

    One process imports everything, and forks one for each moment: imports take seconds.
    """
    folder = tmp_path_factory.mktemp("killed")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.data.test_collect import collect_until_killed\n"
        "for moment in sys.argv[2:]:\n"
        "    if os.fork() == 0:\n"
        "        collect_until_killed(Path(sys.argv[1]) / moment, moment)\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == -9, moment\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder), *SHARDS_LEFT],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("moment", SHARDS_LEFT)
def test_a_killed_collection_resumes_to_the_same_bytes(
    tmp_path: Path, killed: Path, moment: str
) -> None:
    left = contents(killed / moment)
    assert len([name for name in left if name.startswith("shard-")]) == SHARDS_LEFT[moment]
    assert "manifest.json" not in left

    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    model = tiny_model("qwen3_moe")
    model.register_forward_pre_hook(count)
    resumed = collect_tiny(killed / moment, model=model)
    num_batches_left = 10 - min(10, 4 * SHARDS_LEFT[moment])
    assert forwards == num_batches_left * SETTINGS.max_new_tokens
    whole = collect_tiny(tmp_path / "whole")
    assert resumed.digest == whole.digest
    assert contents(killed / moment) == contents(tmp_path / "whole")


def test_a_complete_store_is_not_collected_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = collect_tiny(tmp_path).digest
    before = contents(tmp_path)
    model = tiny_model("qwen3_moe")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with caplog.at_level(logging.INFO):
        assert collect_tiny(tmp_path, model=model).digest == digest
    assert "nothing to collect" in caplog.text
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"settings": changed(max_new_tokens=5)}, r"settings\.max_new_tokens is 4 there and 5"),
        ({"settings": changed(temperature=0.5)}, r"settings\.temperature is 0\.0 there and 0\.5"),
        ({"source": Sentences(text="other words, of course")}, "source_digest"),
        ({"source": Sentences(num_prompts=19)}, "requests and their split"),
        ({"model": tiny_model("qwen3_moe", seed=1)}, "router_digest"),
        ({"model": tiny_model("olmoe")}, r"spec\.fingerprint"),
        ({"model_id": "other"}, r"spec\.model_id is 'tiny' there and 'other' here"),
    ],
)
def test_a_folder_of_other_inputs_is_refused(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    collect_tiny(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match=difference):
        collect_tiny(tmp_path, **changes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_traces_hold_what_one_request_alone_would_give(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    store = collect_tiny(
        tmp_path, model=model, settings=changed(keep_router_probs=True, batch_size=7)
    )
    for trace in store:
        assert trace.token_ids_P is not None
        assert trace.router_probs_TLE is not None
        assert trace.topk_probs_TLK is not None
        logits, expected_TLK = run_plainly(model, trace.token_ids_P[:-1])
        np.testing.assert_array_equal(
            np.sort(trace.topk_expert_ids_TLK, -1), np.sort(expected_TLK, -1)
        )
        generated = trace.token_ids_P[trace.num_prompt_tokens :]
        greedy = logits[0, trace.num_prompt_tokens - 1 :].argmax(-1).numpy()
        np.testing.assert_array_equal(generated, greedy)
        chosen_TLK = np.take_along_axis(
            trace.router_probs_TLE, trace.topk_expert_ids_TLK.astype(np.int64), -1
        )
        np.testing.assert_array_equal(trace.topk_probs_TLK, chosen_TLK)


def test_every_field_of_a_trace_is_filled(tmp_path: Path) -> None:
    source = Sentences()
    store = collect_tiny(tmp_path, source=source)
    assert [trace.request_id for trace in store] == [p.request_id for p in source.prompts()]
    assert set(store.split.values()) == {"fit", "val", "test"}
    assert store.probs_kind == "softmax"
    assert store.manifest.num_tokens == sum(trace.num_tokens for trace in store)
    for trace, prompt in zip(store, source.prompts(), strict=True):
        encoded = [1, *map(ord, prompt.text)][:12]
        assert trace.token_ids_P is not None
        assert trace.token_ids_P[: trace.num_prompt_tokens].tolist() == encoded
        assert len(trace.token_ids_P) == trace.num_tokens + 1 == len(encoded) + 4
        assert trace.first_routed_position == 0
        assert trace.num_prefill_tokens == len(encoded)
        assert (trace.source, trace.topic) == ("sentences", prompt.topic)
        assert trace.prompt == prompt.text[:11]
        assert trace.router_probs_TLE is None


def test_the_split_never_divides_a_topic(tmp_path: Path) -> None:
    store = collect_tiny(tmp_path)
    splits_of_topic: dict[str, set[str]] = {}
    for trace in store:
        splits_of_topic.setdefault(trace.topic, set()).add(store.split[trace.request_id])
    assert len(splits_of_topic) == 11
    assert all(len(splits) == 1 for splits in splits_of_topic.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_results_do_not_depend_on_the_batch(tmp_path: Path, temperature: float) -> None:
    """Float noise may differ, decisions of a model with decided routers do not."""
    stores = [
        collect_tiny(
            tmp_path / str(batch_size),
            settings=changed(batch_size=batch_size, temperature=temperature),
        )
        for batch_size in (1, 3, 20)
    ]
    alone = by_id(stores[0])
    for store in stores[1:]:
        for trace in store:
            expected = alone[trace.request_id]
            np.testing.assert_array_equal(trace.token_ids_P, expected.token_ids_P)
            np.testing.assert_array_equal(trace.topk_expert_ids_TLK, expected.topk_expert_ids_TLK)
            np.testing.assert_allclose(trace.topk_probs_TLK, expected.topk_probs_TLK, atol=1e-3)


def test_rows_after_the_end_of_text_are_dropped(tmp_path: Path) -> None:
    free = by_id(collect_tiny(tmp_path / "free", settings=changed(max_new_tokens=8)))
    tokenizer = Letters()
    new_ids = [trace.token_ids_P[trace.num_prompt_tokens :].tolist() for trace in free.values()]
    flat = [token_id for ids in new_ids for token_id in ids[1:-1]]
    tokenizer.eos_token_id = max(set(flat), key=flat.count)
    stopped = collect_tiny(
        tmp_path / "stopped", tokenizer=tokenizer, settings=changed(max_new_tokens=8)
    )
    num_stopped = 0
    for trace in stopped:
        expected = free[trace.request_id]
        length = len(trace.token_ids_P)
        np.testing.assert_array_equal(trace.token_ids_P, expected.token_ids_P[:length])
        assert trace.num_tokens == length - 1
        np.testing.assert_array_equal(
            trace.topk_expert_ids_TLK, expected.topk_expert_ids_TLK[: length - 1]
        )
        ended = trace.token_ids_P[-1] == tokenizer.eos_token_id
        assert ended or length == len(expected.token_ids_P)
        num_stopped += length < len(expected.token_ids_P)
    assert num_stopped > 0


def test_prompts_alone_can_be_observed(tmp_path: Path) -> None:
    for trace in collect_tiny(tmp_path, settings=changed(max_new_tokens=0)):
        assert trace.num_tokens == trace.num_prompt_tokens == len(trace.token_ids_P)


def test_no_hook_is_left_after_success_or_failure(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    collect_tiny(tmp_path / "good", model=model)
    assert num_hooks() == 0
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect_tiny(tmp_path / "bad", model=model)
    assert num_hooks() == 0


def test_what_cannot_be_collected_is_named(tmp_path: Path) -> None:
    class Mute(Letters):
        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[])

    with pytest.raises(ValueError, match=r"prompt 's\d+'.* has no tokens"):
        collect_tiny(tmp_path, tokenizer=Mute())
    with pytest.raises(ValueError, match="max_new_tokens=600 need 612 positions, .* has 512"):
        collect_tiny(tmp_path, settings=changed(max_new_tokens=600))
    with pytest.raises(ValueError, match="training mode"):
        collect_tiny(tmp_path, model=tiny_model("qwen3_moe").train())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values",
    [
        {"max_prompt_tokens": 0},
        {"max_new_tokens": -1},
        {"batch_size": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"{name}=.*: must be"):
        changed(**values)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(NotAMoEError, match="'llama'"):
        collect_tiny(tmp_path, model=LlamaForCausalLM(config).eval())


def test_a_folder_name_tells_other_inputs_apart() -> None:
    def name(**changes: Any) -> str:
        values = {
            "model": "some/model",
            "dtype": "auto",
            "revision": None,
            "source": Sentences(),
            "settings": SETTINGS,
        }
        return store_name(**{**values, **changes})

    assert re.fullmatch(r"model-sentences-[0-9a-f]{12}", name())
    assert name() == name()
    others = [name(dtype="float32"), name(settings=changed(seed=1)), name(source=Sentences(5))]
    assert len({name(), *others}) == 4


def test_the_embedded_model_is_collected_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text("".join(f'{{"text": "def f{number}(x):"}}\n' for number in range(6)))
    arguments = [
        "model=tiny_moe", "source=jsonl", f"source.path={prompts}",
        "collect.max_prompt_tokens=4", "collect.batch_size=4", f"paths.root={tmp_path / 'root'}",
    ]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "data.collect", *arguments, "collect.max_new_tokens=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    (out,) = (tmp_path / "root" / "traces").iterdir()
    assert out.name.startswith("tiny_moe-mine-")
    store = TraceStore.open(out)
    assert len(store) == 6
    assert all(trace.num_tokens <= 6 for trace in store)

    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    monkeypatch.setattr(
        sys, "argv", ["collect", *arguments, *quiet, "collect.max_new_tokens=4", f"out={out}"]
    )
    with pytest.raises(SystemExit, match="error: .*max_new_tokens is 3 there and 4 here"):
        runpy.run_path(str(ROOT / "data" / "collect.py"), run_name="__main__")
