"""predictors/metrics.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.errors import SpecMismatchError
from data.schema import TraceList
from predictors.base import Forecast
from predictors.metrics import evaluate_recall
from predictors.none import Silent
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.prefetch_budget import experts_per_layer_of
from predictors.reliability import ReliabilityCount
from predictors.semantic import Semantic
from tests.predictors.fakes import (
    SPEC,
    ScriptedPredictor,
    WordEmbedder,
    make_trace,
    make_traces,
    random_traces,
)


def says(*experts: int, later: int = 0) -> Forecast:
    """A forecast that ranks ``experts`` in this order next, and ``later`` first after that."""
    next_LE, future_LE = torch.zeros(2, 4), torch.zeros(2, 4)
    for rank, expert in enumerate(experts):
        next_LE[:, expert] = 0.9 - 0.2 * rank
    future_LE[:, later] = 1.0
    return Forecast(next_LE, future_LE)


def one_test_trace(*experts: int, num_prefill: int = 0) -> TraceList:
    return make_traces({"test": [make_trace("a", experts, num_prefill=num_prefill)]})


def test_zero_staleness_control_is_exactly_one() -> None:
    """The oracle's next use against that same token: anything below 1 is an indexing error."""
    predictor = Oracle()
    traces = random_traces()
    predictor.fit(traces)
    report = evaluate_recall(predictor, traces)
    assert report.recall == 1.0
    assert report.recall_by_layer == [1.0, 1.0]
    assert report.recall_by_lookahead[1] == 1.0
    assert report.reliability.expected_calibration_error == 0.0


def test_recall_counts_used_slots_among_the_k_ranked_first() -> None:
    predictor = ScriptedPredictor([says(0), says(1), says(1), says(3)])
    report = evaluate_recall(predictor, one_test_trace(0, 1, 2, 3))
    assert report.recall == 0.75
    assert (report.num_requests, report.num_tokens, report.top_k) == (1, 4, 1)


def test_recall_is_told_per_layer() -> None:
    """Layer 0 is always right, layer 1 never."""
    next_LE = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    predictor = ScriptedPredictor([Forecast.stationary(next_LE, gamma=0.5)])
    report = evaluate_recall(predictor, one_test_trace(0, 0, 0))
    assert report.recall_by_layer == [1.0, 0.0]


def test_fetching_more_experts_finds_more_and_three_k_is_the_end_of_the_curve() -> None:
    predictor = ScriptedPredictor([says(0, 1, 2, 3)])
    report = evaluate_recall(predictor, one_test_trace(0, 1, 1, 2, 2, 2, 3, 3, 3, 3))
    assert report.recall_by_fetched == pytest.approx({1: 0.1, 2: 0.3, 3: 0.6})


def test_further_ahead_the_ranking_is_the_discounted_future_and_the_end_is_not_judged() -> None:
    predictor = ScriptedPredictor([says(3, later=expert) for expert in (1, 2, 0, 0)])
    report = evaluate_recall(predictor, one_test_trace(0, 1, 2, 3), lookaheads=(1, 2, 3, 8))
    assert report.num_tokens_by_lookahead == {1: 4, 2: 3, 3: 2, 8: 0}
    # Two ahead: before row 0 says 1 (right), before row 1 says 2 (right), before row 2 says 0.
    assert report.recall_by_lookahead == pytest.approx({1: 0.25, 2: 2 / 3, 3: 0.0, 8: 0.0})


def test_tokens_before_the_first_forecast_are_misses_and_counted() -> None:
    predictor = ScriptedPredictor([None, None, says(2), says(3)])
    report = evaluate_recall(predictor, one_test_trace(0, 1, 2, 3))
    assert report.num_tokens_without_forecast == 2
    assert report.recall == 0.5
    assert report.reliability.num_entries.sum() == 2 * 2 * 4


def test_a_silent_predictor_scores_zero() -> None:
    predictor = Silent()
    traces = random_traces()
    predictor.fit(traces)
    report = evaluate_recall(predictor, traces)
    assert report.recall == 0.0
    assert report.num_tokens_without_forecast == report.num_tokens
    assert report.to_json()["reliability"]["expected_calibration_error"] is None


def test_prefill_rows_are_seen_but_not_judged() -> None:
    predictor = ScriptedPredictor([says(3), says(3), says(0), says(1)])
    report = evaluate_recall(predictor, one_test_trace(2, 2, 0, 1, num_prefill=2))
    assert (report.num_tokens, report.recall) == (2, 1.0)


def test_max_tokens_stops_within_a_request() -> None:
    traces = random_traces()
    predictor = Popularity()
    predictor.fit(traces)
    report = evaluate_recall(predictor, traces, max_tokens=50)
    assert (report.num_tokens, report.num_requests) == (50, 2)


def test_a_request_without_tokens_does_not_end_the_judging() -> None:
    traces = make_traces({"test": [make_trace("a", []), make_trace("b", [0, 0])]})
    report = evaluate_recall(ScriptedPredictor([says(0)]), traces)
    assert (report.num_requests, report.num_tokens) == (1, 2)


def test_only_the_asked_split_is_judged() -> None:
    predictor = ScriptedPredictor([says(0)])
    traces = make_traces({"fit": [make_trace("a", [0] * 4)], "test": [make_trace("b", [1] * 4)]})
    assert evaluate_recall(predictor, traces, split="fit").recall == 1.0
    assert evaluate_recall(predictor, traces, split="test").recall == 0.0


def test_one_forecast_for_many_tokens_counts_like_one_forecast_each() -> None:
    """The shortcut for forecasts that do not change is only a shortcut."""
    traces = random_traces()
    lasting = Semantic(embedder=WordEmbedder(), granularity="request", adapt_tokens=None)
    lasting.fit(traces)
    shared = evaluate_recall(lasting, traces).to_json()
    shared_bins = shared.pop("reliability")
    on_token = lasting.on_token
    lasting.on_token = lambda *args, **ids: Forecast(*on_token(*args, **ids))  # type: ignore
    each = evaluate_recall(lasting, traces).to_json()
    each_bins = each.pop("reliability")
    assert each == shared
    assert each_bins["num_entries"] == shared_bins["num_entries"]
    assert each_bins["said"] == pytest.approx(shared_bins["said"])


def test_reliability_of_stated_probabilities() -> None:
    count = ReliabilityCount(num_bins=2)
    # 10 tokens under one forecast: 0.25 came true 5 times, 1.0 came true 9 times.
    count.add(
        np.array([[[0.25, 1.0]]], np.float32),
        np.array([[[5, 9]]], np.int32),
        np.array([10]),
    )
    bins = count.result()
    assert bins.num_entries.tolist() == [10, 10]
    assert bins.said.tolist() == [0.25, 1.0]
    assert bins.came_true.tolist() == [0.5, 0.9]
    assert bins.expected_calibration_error == pytest.approx((0.25 + 0.1) / 2)


def test_report_is_plain_json() -> None:
    traces = random_traces()
    predictor = Popularity()
    predictor.fit(traces)
    values = json.loads(json.dumps(evaluate_recall(predictor, traces).to_json()))
    assert values["kind"] == "popularity"
    assert values["recall_by_lookahead"].keys() == {"1", "2", "4", "8"}


def test_traces_of_another_model_are_refused_with_both_sides() -> None:
    traces = random_traces()
    predictor = Popularity()
    predictor.fit(traces)
    other = replace(traces, spec=replace(SPEC, model_id="other", num_experts=8))
    with pytest.raises(SpecMismatchError, match=r"fake \(2 MoE.*x 4 exp.*other \(2 MoE.*x 8 exp"):
        evaluate_recall(predictor, other)


@pytest.mark.parametrize("lookaheads", [(2,), (0, 1)])
def test_lookaheads_hold_one_and_nothing_below(lookaheads: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="lookaheads"):
        evaluate_recall(ScriptedPredictor([says(0)]), one_test_trace(0), lookaheads=lookaheads)


def test_nothing_to_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token to judge.*'val'"):
        evaluate_recall(ScriptedPredictor([says(0)]), one_test_trace(0), split="val")


def test_prefetch_counts_what_was_fetched_for_nothing() -> None:
    spec = replace(SPEC, expert_bytes_per_layer=(10, 100))
    traces = replace(one_test_trace(0, 1, 2, 3), spec=spec)
    report = evaluate_recall(ScriptedPredictor([says(0, 1), says(1), says(1), says(3)]), traces)
    one, two = report.prefetch[:2]
    assert (one.experts_per_layer, one.issued, one.used, one.wasted) == (1, 8, 6, 2)
    assert one.coverage == report.recall == 0.75
    assert one.issued_bytes_per_token == 110.0
    assert one.wasted_bytes_per_token == 110.0 / 4
    assert (two.issued, two.used) == (16, 6)
    assert [entry.experts_per_layer for entry in report.prefetch] == [1, 2, 3]


def test_nothing_is_prefetched_before_there_is_a_forecast() -> None:
    report = evaluate_recall(ScriptedPredictor([None, says(1)]), one_test_trace(1, 1))
    assert (report.prefetch[0].issued, report.prefetch[0].used) == (2, 2)
    assert report.prefetch[0].coverage == 0.5
    assert report.prefetch[0].wasted_bytes_per_token is None


def test_recall_further_ahead_is_told_per_layer() -> None:
    predictor = ScriptedPredictor([says(0, later=1), says(1), says(1), says(3)])
    report = evaluate_recall(predictor, one_test_trace(0, 1, 2, 3), lookaheads=(1, 2))
    assert set(report.recall_by_lookahead_and_layer) == {1, 2}
    for ahead, recall_L in report.recall_by_lookahead_and_layer.items():
        assert np.mean(recall_L) == pytest.approx(report.recall_by_lookahead[ahead])


def test_a_forecast_that_is_no_number_is_named() -> None:
    bad = says(1)
    bad.next_LE[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"request 'a': the forecast before row 2 holds NaN"):
        evaluate_recall(ScriptedPredictor([says(0), says(1), bad]), one_test_trace(0, 1, 2, 3))


def test_a_prefetch_budget_is_checked() -> None:
    assert experts_per_layer_of(SPEC) == SPEC.top_k
    sized = replace(SPEC, expert_bytes_per_layer=(10, 100))
    assert experts_per_layer_of(sized, bytes_per_token=250) == 2
    assert experts_per_layer_of(sized, bytes_per_token=10_000) == 3
    for arguments, message in (
        ({"experts": 4}, r"1\.\.3"),
        ({"bytes_per_token": 100}, "less than one expert"),
        ({"experts": 1, "bytes_per_token": 200}, "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            experts_per_layer_of(sized, **arguments)
