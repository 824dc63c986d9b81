import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data.errors import DamagedFileError
from data.importers import load_traces
from data.importers.vllm import read_vllm


def routing(num_tokens: int, num_layers: int = 3, num_dense: int = 1, seed: int = 0) -> Any:
    """int16 [T, decoder layers, 2] over 8 experts, zero in the first layers, as vLLM returns it."""
    rng = np.random.default_rng(seed)
    ids: npt.NDArray[np.int16] = np.zeros((num_tokens, num_layers, 2), np.int16)
    for t in range(num_tokens):
        for layer in range(num_dense, num_layers):
            ids[t, layer] = rng.permutation(8)[:2]
    ids[-1, -1] = (7, 6)  # the highest id occurs
    return ids


def write(folder: Path, metadata: Any = None, **arrays: Any) -> Path:
    path = folder / "fake.npz"
    if metadata is not None:
        arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    np.savez(path, **{name.replace("__", "/"): values for name, values in arrays.items()})
    return path


def metadata(**changes: Any) -> dict[str, Any]:
    spec = {"model_id": "m", "num_experts": 16, "top_k": 2, "decoder_layers": [1, 2]}
    row = {"num_prompt_tokens": 9, "first_routed_position": 5, "split": "val", "topic": "x"}
    return {"schema_version": 1, "spec": spec, "requests": {"a": row}} | changes


def test_bare_arrays_are_read_with_what_they_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, generated = routing(4), routing(2, seed=1)
    path = write(tmp_path, a__prompt_routed_experts=prompt, a__routed_experts=generated)
    traces = read_vllm(path)
    trace = traces[0]
    assert (trace.request_id, trace.num_tokens, trace.num_prompt_tokens) == ("a", 6, 4)
    np.testing.assert_array_equal(
        trace.topk_expert_ids_TLK, np.concatenate([prompt, generated])[:, 1:]
    )
    assert trace.topk_expert_ids_TLK.dtype == np.uint8
    assert traces.spec.decoder_layers == (1, 2)
    assert (traces.spec.num_experts, traces.probs_kind) == (8, "none")
    assert "highest id + 1, 8" in caplog.text


def test_the_number_of_experts_can_be_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, a__routed_experts=routing(4))
    assert read_vllm(path, num_experts=64).spec.num_experts == 64
    assert not caplog.records


def test_one_expert_a_token_leaves_no_layer_out(tmp_path: Path) -> None:
    path = write(tmp_path, a__routed_experts=np.zeros((4, 3, 1), np.int16))
    assert read_vllm(path, num_experts=2).spec.num_layers == 3


def test_metadata_says_what_the_arrays_do_not(tmp_path: Path) -> None:
    traces = read_vllm(
        write(
            tmp_path,
            metadata(),
            a__prompt_routed_experts=routing(4),
            a__routed_experts=routing(2),
        )
    )
    trace = traces[0]
    assert (trace.num_prompt_tokens, trace.first_routed_position, trace.topic) == (9, 5, "x")
    assert trace.num_prefill_tokens == 4
    assert traces.split == {"a": "val"}
    assert traces.spec.num_experts == 16


def test_arrays_of_an_engine_that_leaves_dense_layers_out_are_read(tmp_path: Path) -> None:
    ids = routing(4, num_layers=2, num_dense=0)
    trace = read_vllm(write(tmp_path, metadata(), a__routed_experts=ids))[0]
    np.testing.assert_array_equal(trace.topk_expert_ids_TLK, ids)


def test_a_bare_npy_is_one_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = routing(5, num_dense=0)
    np.save(tmp_path / "one.npy", ids)
    traces = load_traces(tmp_path / "one.npy")
    assert (len(traces), traces[0].request_id, traces[0].num_prompt_tokens) == (1, "one", 5)
    np.testing.assert_array_equal(traces[0].topk_expert_ids_TLK, ids)
    assert "all of it taken for prompt tokens" in caplog.text


@pytest.mark.parametrize(
    ("meta", "arrays", "why"),
    [
        (None, {"a__routed_experts": routing(4) - 1}, "expert ids from -1"),
        (None, {"a__routed_experts": routing(4)[0]}, "must be"),
        (None, {"a__routed_experts": routing(4), "b__routed_experts": routing(4, 5)}, "alike"),
        (None, {"a__routed_experts": routing(4), "b__weights": routing(4)}, "'b/weights'"),
        (None, {"a__routed_experts": routing(4)[:0]}, "no token has routing"),
        (metadata(), {"b__routed_experts": routing(4)}, "name different requests"),
        (metadata(schema_version=2), {"a__routed_experts": routing(4)}, "schema_version 2"),
        (metadata(requests={"a": {"split": "dev"}}), {"a__routed_experts": routing(4)}, "'dev'"),
        (metadata(spec={"num_experts": 3}), {"a__routed_experts": routing(4)}, "TypeError"),
        (metadata(), {"a__routed_experts": routing(4, num_layers=1)}, "1 layers do not fit"),
    ],
)
def test_arrays_that_cannot_be_right_are_damage(
    tmp_path: Path, meta: Any, arrays: dict[str, Any], why: str
) -> None:
    with pytest.raises(DamagedFileError, match=rf"fake\.npz is damaged: .*{why}"):
        read_vllm(write(tmp_path, meta, **arrays))


def test_a_truncated_npy_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", routing(5))
    content = (tmp_path / "one.npy").read_bytes()
    (tmp_path / "one.npy").write_bytes(content[:-10])
    with pytest.raises(DamagedFileError, match=r"one\.npy"):
        load_traces(tmp_path / "one.npy")
