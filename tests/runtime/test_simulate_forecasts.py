"""Replays that go by a predictor's forecasts."""

import math
import random

from predictors.base import Forecast, Request, State
from predictors.request_history import RequestHistory
from runtime.policies import make_policy
from runtime.replay import EventList
from runtime.variants import Foresights
from tests.runtime.replay_fakes import Seer, random_request, run, trace_list


def test_a_perfect_forecast_hits_as_often_as_belady() -> None:
    """Zero-staleness control: a forecast used a token late or early would fall behind."""
    traces = trace_list(random_request(random.Random(1), 60))
    seer = Seer(gamma=0.5)
    seer.fit(traces)
    results = run(traces, "forecast", "belady", slots=[3], predictor=seer, with_truth=True)
    assert results["forecast"].hits == results["belady"].hits
    assert results["forecast"].gap_closed == 1.0
    assert seer.rows_asked == list(range(60))


def test_a_layer_goes_by_later_use_once_it_has_routed_the_token() -> None:
    """In a pool, experts of layers still to come are about to be used: they must not look idle."""
    traces = trace_list([[[0, 1], [2, 3]], [[0, 4], [2, 5]]])
    seer = Seer(gamma=0.5)
    seer.fit(traces)
    walked = seer.walk(traces[0], with_truth=True)
    policies = [make_policy("lru"), make_policy("forecast"), make_policy("belady")]
    foresight = Foresights(traces.spec, policies, lambda index: walked)
    event = next(iter(EventList.of(traces)))
    foresight.begin(event)
    assert foresight.scores_PLE[1].tolist() == walked.forecasts[0].forecast_LE.tolist()
    foresight.route(event, 0)
    assert foresight.scores_PLE[1, 0].tolist() == [0.5, 0, 0, 0, 0.5, 0]
    assert foresight.scores_PLE[1, 1].tolist() == [0, 0, 1.5, 1, 0, 0.5]
    foresight.route(event, 1)
    assert foresight.scores_PLE[1, 1].tolist() == [0, 0, 0.5, 0, 0, 0.5]
    assert foresight.scores_PLE[2, 1, [2, 3]].tolist() == [-(1 * 2 + 1), -math.inf]
    assert not foresight.scores_PLE[0].any()


def test_a_forecast_stands_until_there_is_another() -> None:
    class Mute(Seer):
        def on_token(self, state, expert_map_LE, **ids):
            return None

    request = [[[0, 1]], [[2, 3]], [[0, 4]], [[0, 5]]]
    mute = Mute(gamma=0.5)
    mute.fit(trace_list(request))
    results = run(trace_list(request), "forecast", slots=[3], predictor=mute, with_truth=True)
    # Of the first forecast, experts 0 (twice) and then 2 are the ones to keep: two hits on 0.
    assert results["forecast"].hits == 2


def test_a_predictor_that_remembers_requests_is_shown_those_replayed_before() -> None:
    class Remembering(Seer):
        def with_history(self, history: RequestHistory) -> "Remembering":
            self.history, self.known = history, []
            return self

        def on_request(self, state: State, request: Request) -> Forecast:
            uses = self.history.before(self.history.num_finished, 9)
            self.known.append([use_LE[0].nonzero().flatten().tolist() for use_LE in uses])
            return super().on_request(state, request)

    traces = trace_list([[[0]], [[1]]], [[[2]]], [[[3]]])
    predictor = Remembering()
    predictor.fit(traces)
    run(traces, "forecast", slots=[2], predictor=predictor, with_truth=True)
    assert predictor.known == [[], [[0, 1]], [[0, 1], [2]]]
