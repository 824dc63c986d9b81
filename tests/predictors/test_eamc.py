import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.schema import TraceList
from predictors.base import Forecast
from predictors.eamc import Eamc
from predictors.metrics import evaluate_recall
from predictors.popularity import Popularity
from tests.predictors.fakes import make_trace, make_traces, random_traces

PAPER = {"neighbours": 1, "own_tokens": None}


def fitted(traces: TraceList, **options: float | None) -> Eamc:
    predictor = Eamc(**options)  # type: ignore[arg-type]
    predictor.fit(traces)
    return predictor


def last_said(predictor: Eamc, experts: list[int]) -> Forecast:
    said = predictor.walk(make_trace("new", [*experts, 0])).forecasts[-1]
    assert said is not None
    return said


def test_the_match_is_the_one_that_brute_force_over_layers_finds() -> None:
    """Mean over layers of the cosine of count rows, over random matrices with unequal layers."""
    rng = np.random.default_rng(0)

    def random_trace(name: str, num_tokens: int) -> object:
        ids_TLK = rng.choice(4, (num_tokens, 2, 1), p=rng.dirichlet([0.5] * 4)).astype(np.uint8)
        ids_TLK[:, 1] = rng.choice(4, (num_tokens, 1), p=rng.dirichlet([0.5] * 4))
        return replace(make_trace(name, [0] * num_tokens), topk_expert_ids_TLK=ids_TLK)

    stored = [random_trace(f"r{n}", 30) for n in range(20)]
    predictor = fitted(make_traces({"fit": stored}), **PAPER)  # type: ignore[dict-item]
    counts_NLE = predictor.tensors()["use_NLE"].numpy().astype(np.float64)
    for n in range(10):
        new = random_trace(f"q{n}", 12)
        said = predictor.walk(new).forecasts[-1]  # type: ignore[arg-type]
        # The last row is not known yet when the last forecast is made.
        mine_LE = np.stack(
            [np.bincount(new.topk_expert_ids_TLK[:-1, layer, 0], minlength=4) for layer in range(2)]  # type: ignore[attr-defined]
        )
        cosine_NL = (counts_NLE * mine_LE).sum(-1) / (
            np.linalg.norm(counts_NLE, axis=-1) * np.linalg.norm(mine_LE, axis=-1)
        )
        best = int(cosine_NL.mean(axis=1).argmax())
        assert said is not None
        assert said.next_LE.numpy() == pytest.approx(counts_NLE[best], abs=1e-6)


def test_a_request_goes_on_like_the_one_it_resembles() -> None:
    traces = make_traces({"fit": [make_trace("a", [0, 1] * 20), make_trace("b", [2, 3] * 20)]})
    said = last_said(fitted(traces, **PAPER), [2, 2, 2])
    assert said.next_LE[0].tolist() == pytest.approx([0, 0, 0.5, 0.5])
    assert said.forecast_LE[0].tolist() == pytest.approx([0, 0, 10, 10])


def test_the_running_requests_own_counts_take_over() -> None:
    traces = make_traces({"fit": [make_trace("a", [0, 1] * 20)]})
    predictor = fitted(traces, own_tokens=4.0)
    assert last_said(predictor, [2] * 4).next_LE[0].tolist() == pytest.approx([0.25, 0.25, 0.5, 0])
    assert last_said(predictor, [2] * 396).next_LE[0, 2] == pytest.approx(0.99)


def test_several_matches_are_weighed_by_similarity() -> None:
    stored = [make_trace("a", [0] * 3 + [1]), make_trace("b", [0] + [1] * 3)]
    traces = make_traces({"fit": stored})
    cold = last_said(fitted(traces, neighbours=2, temperature=0.01, own_tokens=None), [0])
    hot = last_said(fitted(traces, neighbours=2, temperature=100.0, own_tokens=None), [0])
    assert cold.next_LE[0, 0] == pytest.approx(0.75, abs=1e-3)
    assert hot.next_LE[0, 0] == pytest.approx(0.5, abs=1e-2)


def test_before_the_first_token_there_is_popularity() -> None:
    traces = random_traces()
    predictor, popularity = fitted(traces), Popularity()
    popularity.fit(traces)
    new = make_trace("new", [0, 1])
    said, average = predictor.walk(new).forecasts[0], popularity.walk(new).forecasts[0]
    assert said is not None
    assert average is not None
    assert torch.equal(said.next_LE, average.next_LE)


def test_a_full_store_lets_a_newcomer_replace_what_it_resembles_most(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = [
        make_trace("a", [0] * 8),
        make_trace("b", [1] * 8),
        make_trace("like b", [1] * 7 + [2]),
    ]
    with caplog.at_level(logging.INFO):
        predictor = fitted(make_traces({"fit": stored}), capacity=2)
    assert "storing 2 of 3" in caplog.text
    assert predictor.tensors()["use_NLE"][:, 0].tolist() == [[1, 0, 0, 0], [0, 0.875, 0.125, 0]]


def test_planted_topics_are_recovered_where_popularity_is_blind() -> None:
    traces = random_traces(num_requests=40)
    popularity = Popularity()
    popularity.fit(traces)
    blind = evaluate_recall(popularity, traces).recall
    assert evaluate_recall(fitted(traces), traces).recall > max(0.6, blind + 0.15)


def test_traces_without_probabilities_prompts_and_tokens_are_enough() -> None:
    traces = random_traces()
    bare = replace(
        traces,
        traces=[replace(trace, prompt=None, token_ids_P=None) for trace in traces.traces],
    )
    one, other = fitted(traces).tensors(), fitted(bare).tensors()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_one_request_of_one_constant_expert_is_forecast_and_nothing_is_nan() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", [2] * 9)]}))
    for experts in ([2, 2, 2], [0, 0, 0]):  # the second resembles nothing that is stored
        said = last_said(predictor, experts)
        assert said.forecast_LE.isfinite().all()
        assert said.next_LE.sum(dim=-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_a_request_that_routed_nothing_is_not_stored() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", []), make_trace("b", [1, 1])]}))
    assert len(predictor.tensors()["use_NLE"]) == 1


def test_nothing_to_fit_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="split 'fit'"):
        fitted(make_traces({"test": [make_trace("a", [0])]}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("neighbours", 0), ("capacity", 0), ("temperature", 0.0), ("own_tokens", 0.0)],
)
def test_arguments_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Eamc(**{name: value})  # type: ignore[arg-type]
