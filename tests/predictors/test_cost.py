"""predictors/cost.py."""

import time
from typing import Any

import pytest
import torch

from predictors.base import Forecast
from predictors.cost import measure_stream, num_parameters
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from tests.predictors.fakes import ScriptedPredictor, make_trace, make_traces, random_traces

SLEEP_S = 0.004


class Slow(ScriptedPredictor):
    """Takes its time, and speaks in every layer."""

    moments = frozenset({"request", "token", "routed"})

    def __init__(self) -> None:
        super().__init__([None])
        self.layers: list[int] = []

    def on_routed(self, state: Any, layer: int, router_probs_E: Any) -> Any:
        time.sleep(SLEEP_S / 2)
        self.layers.append(layer)
        return torch.zeros(4)

    def on_token(self, state: Any, expert_map_LE: Any, **ids: Any) -> Forecast | None:
        time.sleep(SLEEP_S)
        return super().on_token(state, expert_map_LE, **ids)


def test_a_token_costs_its_layers_and_itself() -> None:
    predictor = Slow()
    cost = measure_stream(predictor, [make_trace("a", [0] * 12)], max_tokens=6)
    assert cost.num_tokens == 6
    assert cost.us_per_token_median >= 2e6 * SLEEP_S
    assert cost.us_per_token >= 2e6 * SLEEP_S
    assert cost.us_per_routed is not None
    assert 0.5e6 * SLEEP_S <= cost.us_per_routed < cost.us_per_token_median / 2
    assert predictor.layers[:4] == [0, 1, 0, 1]


def test_the_request_counts_too() -> None:
    class SlowStart(ScriptedPredictor):
        def on_request(self, state: Any, request: Any) -> Forecast | None:
            time.sleep(SLEEP_S)
            return None

    traces = [make_trace(name, [0] * 6) for name in "abc"]
    cost = measure_stream(SlowStart([None]), traces)
    assert cost.us_per_request >= 1e6 * SLEEP_S
    assert cost.us_per_token >= 3e6 * SLEEP_S / cost.num_tokens
    assert cost.us_per_token_median < cost.us_per_request


def test_requests_of_one_token_are_timed_by_their_request() -> None:
    cost = measure_stream(ScriptedPredictor([None]), [make_trace("a", [0])])
    assert (cost.num_tokens, cost.us_per_routed) == (0, None)
    assert cost.us_per_token > 0


def test_the_oracle_is_given_the_truth() -> None:
    traces = random_traces()
    predictor = Oracle()
    predictor.fit(traces)
    assert measure_stream(predictor, traces.traces, max_tokens=5).num_tokens == 5


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        measure_stream(ScriptedPredictor([None]), [])


def test_parameters_are_the_floats_that_were_learned() -> None:
    predictor = Popularity()
    predictor.fit(make_traces({"fit": [make_trace("a", [0, 1])]}))
    floats = [t for t in predictor.tensors().values() if t.is_floating_point()]
    assert num_parameters(predictor) == sum(t.numel() for t in floats) >= 8
    assert num_parameters(Oracle()) == 0
