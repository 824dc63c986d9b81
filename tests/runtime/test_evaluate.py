"""runtime/evaluate.py."""

from dataclasses import replace

import pytest
import torch

from data.errors import SpecMismatchError
from predictors.base import Forecast
from predictors.metrics import evaluate_recall
from predictors.none import Silent
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from runtime.evaluate import (
    JudgeSettings,
    judge,
    judge_policies,
    judge_predictor,
    judged_requests,
)
from runtime.simulate import simulate
from tests.predictors.fakes import (
    SPEC,
    ScriptedPredictor,
    make_trace,
    make_traces,
    random_traces,
)

ASKED = {"residencies": (0.5, 0.75), "lookaheads": (1, 2)}
SETTINGS = JudgeSettings(**ASKED)


def fitted(cls: type = PreviousToken):
    predictor = cls()
    predictor.fit(random_traces())
    return predictor


def test_the_gap_is_measured_from_the_replay_without_predictors() -> None:
    """A predictor's replay reuses the hits of LFRU and Belady, and must equal one with them."""
    requests = judged_requests(random_traces(), "test")
    without = judge_policies(requests, SETTINGS)
    found = judge_predictor(fitted(), requests, SETTINGS, without=without)
    alone = simulate(requests, policies=["forecast"], slots=[2, 3], predictor=fitted())
    rows = [row for row in found["replay"] if row["policy"] == "forecast"]
    assert [row["hits"] for row in rows] == [result.hits for result in alone]
    assert [row["gap_closed"] for row in rows] == [result.gap_closed for result in alone]
    belady = {row["slots"]: row["hits"] for row in without if row["policy"] == "belady"}
    assert {r.slots: r.accesses - r.belady_misses for r in alone} == belady


def test_recall_is_that_of_a_walk_of_its_own() -> None:
    traces = random_traces()
    found = judge({"previous_token": fitted()}, traces, **ASKED)
    report = evaluate_recall(fitted(), traces, lookaheads=(1, 2))
    assert found["predictors"]["previous_token"]["recall"] == report.recall
    assert found["predictors"]["previous_token"]["recall_by_layer"] == report.recall_by_layer


def test_each_request_is_walked_once_however_many_budgets_and_policies() -> None:
    walks = []

    class Counting(ScriptedPredictor):
        def walk(self, trace, *, with_truth=False):  # type: ignore[no-untyped-def]
            walks.append(trace.request_id)
            return super().walk(trace, with_truth=with_truth)

    requests = judged_requests(random_traces(), "test")
    without = judge_policies(requests, SETTINGS)
    judge_predictor(Counting([None]), requests, SETTINGS, without=without)
    assert walks == [trace.request_id for trace in requests.traces]


def test_residencies_with_as_many_slots_each_have_their_row() -> None:
    """Of four experts, 25 and 30 % are one slot: the second share once took the first one's row."""
    shares = (0.25, 0.3, 0.5)
    found = judge({"popularity": fitted(Popularity)}, random_traces(), residencies=shares)
    rows = [
        row
        for row in found["replay"]
        if (row["predictor"], row["policy"]) == ("popularity", "forecast")
    ]
    assert [(row["residency"], row["slots"]) for row in rows] == [(0.25, 1), (0.3, 1), (0.5, 2)]
    assert rows[0]["hits"] == rows[1]["hits"] < rows[2]["hits"]


def test_the_oracle_passes_lfru_and_silence_does_not() -> None:
    found = judge({"oracle": fitted(Oracle), "none": fitted(Silent)}, random_traces(), **ASKED)
    gaps = {
        row["predictor"]: row["gap_closed"]
        for row in found["replay"]
        if row["residency"] == 0.5 and row["policy"] == "forecast"
    }
    assert gaps["oracle"] > 0.5 > gaps["none"]
    silent = found["predictors"]["none"]
    assert silent["num_tokens_without_forecast"] == silent["num_tokens"]
    assert silent["reliability"]["expected_calibration_error"] is None


def test_only_the_split_asked_for_is_judged() -> None:
    traces = random_traces()
    assert len(judged_requests(traces, "all")) == len(traces)
    test = judged_requests(traces, "test")
    assert {traces.split[trace.request_id] for trace in test.traces} == {"test"}
    with pytest.raises(ValueError, match="split='tets'"):
        judged_requests(traces, "tets")  # type: ignore[arg-type]
    empty = make_traces({"fit": [make_trace("a", [0])]})
    with pytest.raises(ValueError, match="nothing to judge"):
        judged_requests(empty, "test")


def test_threads_are_as_before() -> None:
    """A multirun's jobs share a process: one thread for the replay slowed the next job's fit."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        judge({"popularity": fitted(Popularity)}, random_traces(), **ASKED)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_predictor_with_a_device_is_timed_on_the_gpu_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = []

    class Movable(ScriptedPredictor):
        def to(self, device: str) -> None:
            moved.append(device)

    requests = judged_requests(random_traces(), "test")
    without = judge_policies(requests, SETTINGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = Forecast.stationary(torch.full((2, 4), 0.25), gamma=0.9)
    found = judge_predictor(Movable([said]), requests, SETTINGS, without=without)
    assert found["cost"]["us_per_token_gpu"] is None
    assert found["cost"]["us_per_token"] > 0
    assert not moved


def test_another_models_predictor_is_refused() -> None:
    predictor = ScriptedPredictor([None])
    predictor.spec = replace(SPEC, num_experts=8)
    requests = judged_requests(random_traces(), "test")
    with pytest.raises(SpecMismatchError, match="8 experts"):
        judge_predictor(predictor, requests, SETTINGS, without=judge_policies(requests, SETTINGS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residencies": []}, "at least one share"),
        ({"residencies": [1.5]}, r"1\.5: must be a share"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"cost_tokens": 0}, "cost_tokens=0"),
        ({"policies": ["lruu"]}, "'lruu' does not exist"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeSettings(**settings)


def test_baseline_hits_must_fit_the_budgets() -> None:
    requests = judged_requests(random_traces(), "test")
    with pytest.raises(ValueError, match="one for each budget"):
        simulate(
            requests, policies=["lru"], slots=[2, 3], baseline_hits={"lfru": [1], "belady": [2]}
        )
