"""The forecaster learns what can be learned, sees no future, and survives odd traces."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import MoecastError
from data.schema import MoESpec, Trace, TraceList
from predictors.artifact import load_artifact, save_artifact
from predictors.base import Predictor, Request
from predictors.forecaster import Forecaster
from predictors.forecaster_net import ForecasterNet
from predictors.metrics import evaluate_recall
from predictors.token_history import NUM_ROWS
from tests.predictors.fakes import SPEC, make_trace, make_traces, random_traces

SMALL: dict[str, Any] = {
    "hidden_dim": 32,
    "epochs": 8,
    "batch_size": 32,
    "dropout": 0.1,
    "weight_decay": 0.01,
    "learning_rate": 1e-2,
    "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
}


def periodic_traces(num_requests: int = 24, num_tokens: int = 40) -> TraceList:
    """Token n uses expert n mod 4, from a random start: all is known once one token is."""
    parts: dict[Any, list[Trace]] = {"fit": [], "val": [], "test": []}
    for n in range(num_requests):
        split = ("fit", "fit", "val", "test")[n % 4]
        experts = [(n // 4 + t) % 4 for t in range(num_tokens)]
        parts[split].append(make_trace(f"r{n}", experts, tokens=[0] * num_tokens))
    return make_traces(parts)


@pytest.fixture(scope="module")
def traces() -> TraceList:
    return random_traces(num_requests=24)


@pytest.fixture(scope="module")
def fitted(traces: TraceList) -> Forecaster:
    predictor = Forecaster(**SMALL, num_nets=2)
    predictor.fit(traces)
    return predictor


def test_a_pattern_is_learned() -> None:
    periodic = periodic_traces()
    predictor = Forecaster(**SMALL)
    predictor.fit(periodic)
    assert evaluate_recall(predictor, periodic).recall > 0.95  # the first token is a guess
    walked = predictor.walk(periodic[3])
    assert walked.later_TLE is not None
    experts_T = periodic[3].topk_expert_ids_TLK[:, 0, 0]
    for t in range(1, 40):  # who comes soonest is worth most, who was just used is worth least
        worth_E = walked.later_TLE[t, 0]
        soonest = [(int(experts_T[t]) + step) % 4 for step in (1, 2, 3, 4)]
        assert worth_E.argsort(descending=True).tolist() == soonest


def test_a_whole_trace_at_once_says_what_each_token_was_told(
    fitted: Forecaster, traces: TraceList
) -> None:
    at_once, streamed = fitted.walk(traces[3]), Predictor.walk(fitted, traces[3])
    for one, other in zip(at_once.forecasts, streamed.forecasts, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.next_LE, other.next_LE, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.forecast_LE, other.forecast_LE, rtol=0, atol=1e-4)
    assert at_once.later_TLE is not None
    torch.testing.assert_close(at_once.later_TLE, streamed.later_TLE, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", [[30], [1, 29], [12, 2, 16]])
def test_a_prompt_at_once_is_its_tokens_in_turn(
    fitted: Forecaster, traces: TraceList, parts: list[int]
) -> None:
    trace = traces[3]
    assert trace.token_ids_P is not None
    maps_TLE = torch.from_numpy(trace.expert_maps_TLE(SPEC.num_experts))
    ids: list[int] = trace.token_ids_P.tolist()
    at_once, in_turn = fitted.new_state(), fitted.new_state()
    for state in (at_once, in_turn):
        fitted.on_request(state, Request.of(trace))
    start = 0
    for stop in np.cumsum(parts).tolist():
        arguments = (maps_TLE[start:stop], ids[start:stop], ids[start + 1 : stop + 1])
        said = [
            way(state, arguments[0], token_ids_T=arguments[1], next_token_ids_T=arguments[2])
            for way, state in (
                (fitted.on_tokens, at_once),
                (partial(Predictor.on_tokens, fitted), in_turn),
            )
        ]
        for one, other in zip(*said, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        start = stop
    assert at_once.num_tokens == in_turn.num_tokens == 30
    assert at_once.tokens == in_turn.tokens
    for layer in range(SPEC.num_layers):  # the layers of the token after it
        later = [fitted.on_routed(s, layer, maps_TLE[30, layer]) for s in (at_once, in_turn)]
        torch.testing.assert_close(later[0], later[1], rtol=0, atol=1e-5)


def test_a_future_that_gives_itself_away_is_not_seen() -> None:
    """Planted: layer 1 uses, for each token, the expert that layer 0 will use for the next one, and
    nothing else tells. Layer 0 evicts before layer 1 routes, so its evictions must not know; the
    forecast before the next token comes after layer 1 and must: the control, which shows that the
    signal is there to be found."""
    rng = np.random.default_rng(0)
    parts: dict[Any, list[Trace]] = {"fit": [], "val": [], "test": []}
    for n in range(40):
        drawn = rng.integers(0, 4, 41)
        ids_TLK = np.stack([drawn[:-1], drawn[1:]], axis=1)[..., None].astype(np.uint8)
        trace = replace(make_trace(f"r{n}", [0] * 40, tokens=[0] * 40), topk_expert_ids_TLK=ids_TLK)
        parts[("fit", "fit", "val", "test")[n % 4]].append(trace)
    planted = make_traces(parts)
    predictor = Forecaster(**{**SMALL, "epochs": 20})
    predictor.fit(planted)
    guessed = seen = total = 0
    for n in range(3, 40, 4):
        later_TLE = predictor.walk(planted[n]).later_TLE
        assert later_TLE is not None
        ids_TL = planted[n].topk_expert_ids_TLK[..., 0]
        guessed += int((later_TLE[:-1, 0].argmax(-1).numpy() == ids_TL[1:, 0]).sum())
        forecasts = predictor.walk(planted[n]).forecasts[1:]
        said = [int(f.next_LE[0].argmax()) for f in forecasts if f is not None]
        seen += int((np.array(said) == ids_TL[1:, 0]).sum())
        total += 39
    assert guessed / total < 0.4  # chance is 0.25
    assert seen / total > 0.95


def test_a_layer_reads_no_later_layer(fitted: Forecaster, traces: TraceList) -> None:
    """Whatever layer 1 routes at row t, layer 0's evictions at row t stay the same."""
    trace = traces[3]
    ids_TLK = trace.topk_expert_ids_TLK.copy()
    ids_TLK[20, 1] = (ids_TLK[20, 1] + 1) % 4
    before, after = (
        fitted.walk(t).later_TLE for t in (trace, replace(trace, topk_expert_ids_TLK=ids_TLK))
    )
    assert before is not None
    assert after is not None
    torch.testing.assert_close(before[:20], after[:20])
    torch.testing.assert_close(before[20, 0], after[20, 0])
    assert not torch.equal(before[20, 1], after[20, 1])


def test_a_pass_that_was_broken_off_leaves_no_trace(fitted: Forecaster, traces: TraceList) -> None:
    """Layers that have routed once already are asked again when the token comes again."""
    state = fitted.new_state()
    fitted.on_request(state, Request.of(traces[3]))
    map_LE = torch.from_numpy(traces[3].expert_map_LE(0, 4))
    first = [fitted.on_routed(state, layer, map_LE[layer]) for layer in (0, 1)]
    again = [fitted.on_routed(state, layer, map_LE[layer]) for layer in (0, 1)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_an_earlier_layer_tells_a_later_one() -> None:
    net = ForecasterNet(num_layers=3, num_experts=4, num_tokens=0, num_discounts=1, hidden_dim=8)
    torch.nn.init.normal_(net.take_LQE)
    rows = torch.rand(2, NUM_ROWS, 3, 4)
    rows[1] = rows[0]
    rows[1, 0, 1] += 1  # layer 1 routed otherwise
    said = net.eval().before(rows[:1].expand(2, -1, -1, -1), torch.zeros(2, 3, dtype=torch.int64))
    later_BLGE = net.after(said, rows)
    changed = [not torch.allclose(later_BLGE[0, layer], later_BLGE[1, layer]) for layer in range(3)]
    assert changed == [False, True, True]


def test_an_artifact_makes_the_same_forecasts(
    fitted: Forecaster, traces: TraceList, tmp_path: Path
) -> None:
    save_artifact(fitted, tmp_path / "a", spec=SPEC, parents={})
    again = load_artifact(tmp_path / "a")
    assert again.config() == fitted.config()
    for one, other in zip(
        fitted.walk(traces[3]).forecasts, again.walk(traces[3]).forecasts, strict=True
    ):
        assert one is not None
        assert other is not None
        assert torch.equal(one.next_LE, other.next_LE)
        assert torch.equal(one.forecast_LE, other.forecast_LE)


def test_the_same_seed_fits_the_same_and_another_seed_does_not(traces: TraceList) -> None:
    once, twice, other = (Forecaster(**{**SMALL, "epochs": 1}, seed=s) for s in (0, 0, 1))
    for predictor in (once, twice, other):
        predictor.fit(traces)
    name = "nets.0.say_next.weight"
    assert torch.equal(once.tensors()[name], twice.tensors()[name])
    assert not torch.equal(once.tensors()[name], other.tensors()[name])


def test_what_it_learned_of_next_layers_is_part_of_an_artifact(fitted: Forecaster) -> None:
    tensors, spec = dict(fitted.tensors()), fitted.fitted_spec()
    again, older = (Forecaster(**SMALL, num_nets=2) for _ in range(2))
    again.load_state(spec, tensors)
    assert fitted.next_layers is not None
    assert again.next_layers is not None
    ids_1K = torch.arange(spec.top_k)[None]
    next_LE = torch.full((spec.num_layers, spec.num_experts), 0.25)
    said = []
    for learned in (fitted.next_layers, again.next_layers):
        learned = copy.deepcopy(learned)
        learned._has_kernels = False
        said.append(learned.look_ahead(0, ids_1K, next_LE, 2))
    assert torch.equal(*said)
    older.load_state(
        spec, {name: t for name, t in tensors.items() if not name.startswith("next_layers.")}
    )
    assert older.next_layers is None


def test_the_report_says_where_the_time_went(traces: TraceList) -> None:
    report = Forecaster(**{**SMALL, "epochs": 1}).fit(traces)
    names = ("features", "training", "calibration", "next_layers", "rule")
    parts = [report.details[f"{name}_s"] for name in names]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(report.fit_s)


def without_ids(trace: Trace) -> Trace:
    return replace(trace, token_ids_P=None)


def without_prompt(trace: Trace) -> Trace:
    return replace(trace, prompt=None)


def prefill_only(trace: Trace) -> Trace:
    return replace(trace, num_prompt_tokens=trace.num_tokens)


def decode_only(trace: Trace) -> Trace:
    """Ten prompt tokens whose routing nobody recorded."""
    ids_P = np.concatenate([np.zeros(10, np.int32), trace.token_ids_P])
    return replace(trace, token_ids_P=ids_P, num_prompt_tokens=10, first_routed_position=10)


@pytest.mark.parametrize("strip", [without_ids, without_prompt, prefill_only, decode_only])
def test_it_makes_do_with_what_was_recorded(traces: TraceList, strip: Any) -> None:
    stripped = replace(traces, traces=[strip(trace) for trace in traces.traces])
    predictor = Forecaster(**SMALL)
    predictor.fit(stripped)
    assert evaluate_recall(predictor, stripped).recall > 0.5  # chance is 0.25


def test_what_was_fitted_with_ids_serves_without_them(
    fitted: Forecaster, traces: TraceList
) -> None:
    blind = replace(traces, traces=[without_ids(trace) for trace in traces.traces])
    assert evaluate_recall(fitted, blind).recall > 0.35  # chance is 0.25


def test_one_request_is_enough_to_fit() -> None:
    alone = make_traces({"fit": [make_trace("only", [0, 1, 2, 3] * 10)]})
    predictor = Forecaster(**{**SMALL, "epochs": 1})
    assert predictor.fit(alone).details["calibrated"] is False


def test_a_constant_target_is_learned() -> None:
    """Experts that are always or never used have no finite log odds."""
    constant = make_traces(
        {split: [make_trace(split, [2] * 40)] for split in ("fit", "val", "test")}  # type: ignore[misc]
    )
    predictor = Forecaster(**SMALL)
    predictor.fit(constant)
    assert evaluate_recall(predictor, constant).recall == 1.0


def test_probabilities_that_are_not_finite_are_refused() -> None:
    probs = np.full((40, 2, 1), np.nan, np.float16)
    sick = make_traces({"fit": [make_trace("sick", [0] * 40, topk_probs_TLK=probs)]})
    with pytest.raises(MoecastError, match="'sick'"):
        Forecaster(**SMALL).fit(sick)


def test_nothing_to_fit_on_is_said() -> None:
    with pytest.raises(ValueError, match="no routed token has split 'fit'"):
        Forecaster(**SMALL).fit(make_traces({"test": [make_trace("t", [0] * 9)]}))


def test_a_large_set_is_fitted_on_some_of_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    traces = random_traces(num_requests=24)
    report = Forecaster(**{**SMALL, "epochs": 1}, max_fit_tokens=200).fit(traces)
    assert report.details["num_fitted_tokens"] == 200
    assert "fitting on 5 of 12 requests" in caplog.text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("discounts", []),
        ("discounts", [1.0]),
        ("hidden_dim", 0),
        ("num_nets", 0),
        ("epochs", 0),
        ("dropout", 1.0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("token_capacity", -1),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        Forecaster(**{argument: value})


def test_top_k_larger_than_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k=5: must be in 1..num_experts=4"):
        MoESpec(model_id="odd", num_experts=4, top_k=5, decoder_layers=(0,))
