import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DamagedFileError, MalformedInputError
from data.importers import load_traces
from data.importers.moelens import read_moelens

PROBS_TLE = [[[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]] * 3


def line(model: str = "some/model", **changes: Any) -> dict[str, Any]:
    """Three tokens, decoder layers 1 and 2 of 4 experts, top-2."""
    layers = [
        {
            "layer": layer + 1,
            "experts": np.argsort(np.array(PROBS_TLE)[:, layer], axis=-1)[:, :-3:-1].tolist(),
            "weights": np.sort(np.array(PROBS_TLE)[:, layer], axis=-1)[:, :-3:-1].tolist(),
            "all_probs": [row[layer] for row in PROBS_TLE],
        }
        for layer in range(2)
    ]
    return {
        "model": model, "prompt": "a b a", "domain": "math", "num_experts": 4, "top_k": 2,
        "tokens": ["a", " b", "a"], "layers": layers,
    } | changes  # fmt: skip


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "fake.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in lines))
    return path


def test_the_whole_softmax_is_kept(tmp_path: Path) -> None:
    traces = read_moelens(write(tmp_path, line()))
    trace = traces[0]
    assert traces.spec.describe() == "some/model (2 MoE layers x 4 experts, top-2)"
    assert traces.spec.decoder_layers == (1, 2)
    assert traces.probs_kind == "softmax"
    assert trace.router_probs_TLE is not None
    np.testing.assert_allclose(trace.router_probs_TLE, PROBS_TLE, atol=1e-3)
    np.testing.assert_array_equal(trace.topk_expert_ids_TLK[0], [[0, 1], [3, 2]])
    np.testing.assert_allclose(trace.expert_map_LE(0, 4), PROBS_TLE[0], atol=1e-3)
    assert (trace.prompt, trace.topic, trace.num_prefill_tokens) == ("a b a", "math", 3)


def test_equal_tokens_have_equal_ids_in_all_prompts(tmp_path: Path) -> None:
    traces = read_moelens(write(tmp_path, line(), line(tokens=[" b", "c", "a"])))
    np.testing.assert_array_equal(traces[0].token_ids_P, [0, 1, 0])
    np.testing.assert_array_equal(traces[1].token_ids_P, [1, 2, 0])


def test_an_incomplete_softmax_is_left_out(tmp_path: Path) -> None:
    values = line()
    del values["layers"][1]["all_probs"]
    trace = read_moelens(write(tmp_path, values))[0]
    assert trace.router_probs_TLE is None
    assert trace.topk_probs_TLK is not None


def test_of_several_models_the_commonest_is_read_and_the_others_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, line("small"), line("big"), line("big"))
    assert (len(load_traces(path)), load_traces(path).spec.model_id) == (2, "big")
    assert "small" in caplog.text
    assert len(read_moelens(path, model="small")) == 1
    with pytest.raises(ValueError, match=r"model='none'.*\['big', 'small'\]"):
        read_moelens(path, model="none")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokens": ["a"]}, "1 tokens, but routing of 3"),
        ({"layers": [{"layer": 1}]}, "experts"),
        ({"layers": []}, "ValueError"),
        ({"num_experts": 5}, "all_probs"),
    ],
)
def test_a_line_that_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(MalformedInputError, match=rf"fake\.jsonl, line 2: .*{why}"):
        read_moelens(write(tmp_path, line(), line(**changes)))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, line())
    path.write_text(path.read_text() + '{"model"\n')
    with pytest.raises(MalformedInputError, match="line 2"):
        load_traces(path)


def test_impossible_experts_are_damage(tmp_path: Path) -> None:
    values = line()
    values["layers"][0]["experts"][0] = [0, 9]
    with pytest.raises(DamagedFileError, match="expert ids from 0 to 9"):
        read_moelens(write(tmp_path, values))


def test_the_real_file_holds_router_distributions(shared_data: Path) -> None:
    path = shared_data / "traces/moelens_small/deepseek_moe_16b_and_jetmoe_8b_full_probs.jsonl"
    deepseek = read_moelens(path)
    jetmoe = read_moelens(path, model="jetmoe/jetmoe-8b")
    assert (len(deepseek), len(jetmoe)) == (10, 1)
    assert deepseek.spec.decoder_layers == tuple(range(1, 28))
    for trace in (*deepseek.traces, *jetmoe.traces):
        assert trace.router_probs_TLE is not None
        np.testing.assert_allclose(trace.router_probs_TLE.sum(-1, dtype=np.float32), 1, atol=0.01)
