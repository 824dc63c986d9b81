from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.importers import load_traces
from data.schema import MoESpec, Trace, TraceList
from predictors.base import Predictor, Request
from predictors.markov import Markov
from predictors.metrics import evaluate_recall
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from tests.predictors.fakes import SPEC, make_trace, make_traces, random_traces

CYCLE = [0, 1, 2, 3] * 20


def fitted(traces: TraceList, **options: float) -> Markov:
    predictor = Markov(**options)  # type: ignore[arg-type]
    predictor.fit(traces)
    return predictor


def one_hot_LE(expert: int) -> torch.Tensor:
    return torch.eye(4)[[expert] * SPEC.num_layers]


def two_layer_trace(lower: list[int], upper: list[int]) -> Trace:
    ids_TLK = np.array([lower, upper], np.uint8).T[..., None]
    return replace(make_trace("a", lower), topk_expert_ids_TLK=ids_TLK)


def test_a_cycle_is_learned_and_the_next_expert_named() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", CYCLE)]}))
    state = predictor.new_state()
    for expert in range(4):
        said = predictor.on_token(state, one_hot_LE(expert))
        assert said is not None
        assert said.next_LE.argmax(dim=-1).tolist() == [(expert + 1) % 4] * 2


def test_one_row_is_the_smoothed_share_of_successors() -> None:
    """0 is followed by 1, 1 and 2; popularity is 1/2, 1/3, 1/6 of six tokens; two prior tokens."""
    trace = make_trace("a", [0, 1, 0, 1, 0, 2])
    predictor = fitted(make_traces({"fit": [trace]}), prior_tokens=2.0)
    expected_E = (np.array([0, 2, 1, 0]) + 2 * np.array([3, 2, 1, 0]) / 6) / (3 + 2)
    assert predictor.tensors()["next_LEE"][1, 0].numpy() == pytest.approx(expected_E)
    said = predictor.on_token(predictor.new_state(), one_hot_LE(0))
    assert said is not None
    # Odds are kept 1e-4 away from certainty, so a share of 0 comes back as that.
    assert said.next_LE[0].numpy() == pytest.approx(expected_E, abs=2e-4)


def test_the_forecast_is_the_discounted_use_of_an_endless_request() -> None:
    """In 0 1 0 1 ... a 0 is followed by 1 at odd steps, by 0 at even ones."""
    gamma = 0.5
    traces = make_traces({"fit": [make_trace("a", [0, 1] * 2000)]})
    predictor = fitted(traces, gamma=gamma, prior_tokens=0.1)
    said = predictor.on_token(predictor.new_state(), one_hot_LE(0))
    assert said is not None
    odd, even = 1 / (1 - gamma**2), gamma / (1 - gamma**2)
    assert said.forecast_LE[0].tolist() == pytest.approx([even, odd, 0.0, 0.0], abs=2e-3)


def test_the_layer_that_has_just_routed_gets_its_own_later_use() -> None:
    """Unit of `forecast - next` as it stood before the token: one discount more."""
    predictor = fitted(random_traces(), gamma=0.8)
    state = predictor.new_state()
    map_LE = torch.eye(4)[[2, 1]]
    later = [predictor.on_routed(state, layer, map_LE[layer]) for layer in range(2)]
    said = predictor.on_token(state, map_LE)
    assert said is not None
    for layer in range(2):
        assert torch.equal(later[layer], 0.8 * said.forecast_LE[layer])  # type: ignore[arg-type]


def test_the_upper_layer_is_read_off_the_lower_and_past_the_end_is_nan() -> None:
    rng = np.random.default_rng(0)
    lower = rng.integers(0, 4, 400).tolist()
    traces = make_traces({"fit": [two_layer_trace(lower, [3 - expert for expert in lower])]})
    predictor = fitted(traces, num_layers_ahead=3)
    probs_TE = torch.eye(4)
    ahead_THE = predictor.on_layer(predictor.new_state(), 0, torch.zeros(4, 8), probs_TE)
    assert ahead_THE is not None
    assert (ahead_THE.shape, ahead_THE.dtype) == ((4, 3, 4), torch.float32)
    assert ahead_THE[:, 0].argmax(dim=-1).tolist() == [3, 2, 1, 0]
    assert ahead_THE[:, 0].isfinite().all()
    assert ahead_THE[:, 1:].isnan().all()
    last_THE = predictor.on_layer(predictor.new_state(), 1, torch.zeros(4, 8), probs_TE)
    assert last_THE is not None
    assert last_THE.isnan().all()


def test_several_used_experts_are_independent_evidence() -> None:
    """Two of three experts a token, in a fixed order: both rows point at the same successors."""
    spec = MoESpec(model_id="fake", num_experts=6, top_k=2, decoder_layers=(0,))
    pairs = np.array([[0, 1], [2, 3], [4, 5]] * 30, np.uint8)[:, None, :]
    trace = replace(make_trace("a", [0]), topk_expert_ids_TLK=pairs, token_ids_P=None)
    predictor = fitted(
        TraceList(spec=spec, traces=[trace], split={"a": "fit"}, digest="fake"), prior_tokens=5.0
    )
    map_1E = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]])
    said = predictor.on_token(predictor.new_state(), map_1E)
    assert said is not None
    assert set(said.next_LE[0].topk(2).indices.tolist()) == {2, 3}
    # More than either row alone says: (29 + 5/3) / (29 + 5) = 0.90.
    assert said.next_LE[0, 2] > 0.95


def test_the_walk_says_what_token_by_token_is_said() -> None:
    """It batches; `Predictor.walk` is the definition. More tokens than one batch holds."""
    traces = random_traces(num_tokens=300)
    predictor = fitted(traces)
    fast, slow = predictor.walk(traces[3]), Predictor.walk(predictor, traces[3])
    assert len(fast.forecasts) == len(slow.forecasts) == 300
    for one, other in zip(fast.forecasts, slow.forecasts, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one.next_LE, other.next_LE)
        assert torch.allclose(one.forecast_LE, other.forecast_LE)
    assert fast.later_TLE is not None
    assert slow.later_TLE is not None
    assert torch.allclose(fast.later_TLE, slow.later_TLE)


def test_before_the_first_token_there_is_popularity() -> None:
    traces = random_traces()
    predictor, popularity = fitted(traces), Popularity()
    popularity.fit(traces)
    said = predictor.on_request(predictor.new_state(), Request())
    expected = popularity.on_request(popularity.new_state(), Request())
    assert said is not None
    assert expected is not None
    assert torch.equal(said.next_LE, expected.next_LE)


def test_recorded_probabilities_change_nothing() -> None:
    traces = random_traces()
    probs = [np.full(t.topk_expert_ids_TLK.shape, 0.25, np.float16) for t in traces.traces]
    told = replace(
        traces,
        traces=[
            replace(trace, topk_probs_TLK=probs_TLK)
            for trace, probs_TLK in zip(traces.traces, probs, strict=True)
        ],
    )
    one, other = fitted(traces).tensors(), fitted(told).tensors()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_one_request_of_one_constant_expert_is_forecast_and_nothing_is_nan() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", [2] * 9)]}))
    for said in predictor.walk(make_trace("b", [2, 2, 0, 0])).forecasts:
        assert said is not None
        assert said.forecast_LE.isfinite().all()
        assert said.next_LE.argmax(dim=-1).tolist() == [2, 2]


def test_one_request_of_one_token_has_no_transition_and_says_popularity() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", [1])]}))
    said = predictor.on_token(predictor.new_state(), one_hot_LE(1))
    assert said is not None
    assert said.next_LE[0].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-3)


def test_nothing_to_fit_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="split 'fit'"):
        fitted(make_traces({"test": [make_trace("a", [0])]}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("prior_tokens", 0.0), ("prior_tokens", float("nan")), ("num_layers_ahead", 0)],
)
def test_arguments_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Markov(**{name: value})  # type: ignore[arg-type]


def test_one_step_of_memory_beats_repeating_the_token_on_real_subjects_never_seen(
    shared_data: Path,
) -> None:
    whole = load_traces("gptoss20b")
    assert isinstance(whole, TraceList)
    traces = replace(whole, traces=whole.traces[::6])
    recall = {}
    for predictor in (Markov(), PreviousToken()):
        predictor.fit(traces)
        recall[predictor.kind] = evaluate_recall(predictor, traces, max_tokens=2000).recall
    assert recall["markov"] > recall["previous_token"] + 0.02
