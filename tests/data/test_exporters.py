import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from data.exporters.vllm import export_vllm, main
from data.importers import load_traces
from data.importers.vllm import read_vllm
from data.schema import MoESpec, Trace, TraceList, TraceSet

LOST = {"topk_probs_TLK", "router_probs_TLE", "prompt_embedding_S"}


def traces() -> TraceList:
    """Three requests over decoder layers 1 and 3, 300 experts: decode only, both, prompt only."""
    rng = np.random.default_rng(0)
    spec = MoESpec(
        model_id="fake",
        num_experts=300,
        top_k=2,
        decoder_layers=(1, 3),
        expert_bytes_per_layer=(10, 20),
        hidden_size=4,
    )
    requests = []
    for name, num_tokens, num_prompt_tokens, first in (
        ("a/b", 4, 7, 7),
        ("c", 5, 3, 0),
        ("d", 3, 3, 0),
    ):
        ids_TLK = np.stack(
            [[rng.permutation(300)[:2] for _ in range(2)] for _ in range(num_tokens)]
        ).astype(np.int16)
        requests.append(
            Trace(
                request_id=name,
                source="fake",
                topic="t",
                topk_expert_ids_TLK=ids_TLK,
                num_prompt_tokens=num_prompt_tokens,
                first_routed_position=first,
                topk_probs_TLK=np.full(ids_TLK.shape, 0.5, np.float16),
                token_ids_P=np.arange(first + num_tokens, dtype=np.int32) if name != "d" else None,
                prompt="ä prompt" if name == "c" else None,
            )
        )
    return TraceList(
        spec=spec,
        traces=requests,
        split={"a/b": "fit", "c": "test", "d": "val"},
        digest="",
        probs_kind="topk_softmax",
    )


def assert_equal(one: TraceSet, other: TraceSet) -> None:
    assert (one.spec, one.split, len(one)) == (other.spec, other.split, len(other))
    for index in range(len(one)):
        for field in dataclasses.fields(Trace):
            value, expected = (getattr(side[index], field.name) for side in (other, one))
            if field.name in LOST:
                assert value is None
            elif isinstance(expected, np.ndarray):
                np.testing.assert_array_equal(value, expected)
                assert value.dtype == expected.dtype
            else:
                assert value == expected


def test_what_was_exported_is_imported_again(tmp_path: Path) -> None:
    export_vllm(traces(), tmp_path / "x.npz")
    assert_equal(traces(), read_vllm(tmp_path / "x.npz"))


def test_arrays_are_those_of_vllm(tmp_path: Path) -> None:
    """Layer axis over decoder layers with zeros in dense ones, prompt and answer apart, int16."""
    export_vllm(traces(), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        prompt, generated = arrays["c/prompt_routed_experts"], arrays["c/routed_experts"]
        assert arrays["a/b/prompt_routed_experts"].shape == (0, 4, 2)
        assert arrays["a/b/routed_experts"].shape == (4, 4, 2)
    assert (prompt.shape, generated.shape, prompt.dtype) == ((3, 4, 2), (2, 4, 2), np.int16)
    ids_TLK = traces()[1].topk_expert_ids_TLK
    np.testing.assert_array_equal(np.concatenate([prompt, generated])[:, [1, 3]], ids_TLK)
    assert not prompt[:, [0, 2]].any()


def test_the_same_traces_give_the_same_file(tmp_path: Path) -> None:
    for name in ("x.npz", "y.npz"):
        export_vllm(traces(), tmp_path / name)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")
    broken = dataclasses.replace(traces(), split={})
    with pytest.raises(KeyError):
        export_vllm(broken, path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
    assert path.read_bytes() == b"old"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm", *arguments])
    main()


def test_the_command_takes_any_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_vllm(traces(), tmp_path / "x.npz")
    run(monkeypatch, f"trace={tmp_path / 'x.npz'}", f"out={tmp_path / 'new' / 'y.npz'}")
    assert "3 requests of fake (2 MoE layers x 300 experts, top-2)" in capsys.readouterr().out
    assert_equal(load_traces(tmp_path / "x.npz"), load_traces(tmp_path / "new" / "y.npz"))


def test_an_unknown_trace_ends_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="error: trace 'none': no such file") as caught:
        run(monkeypatch, "trace=none", f"out={tmp_path / 'y.npz'}")
    assert caught.value.code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gptoss20b", "esft", "qwen"])
def test_real_traces_survive_the_way_there_and_back(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    real = load_traces(name)
    export_vllm(real, tmp_path / "x.npz")
    assert_equal(real, load_traces(tmp_path / "x.npz"))
