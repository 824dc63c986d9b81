"""What no predictor may do: see the future, share a past between requests, learn from test."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.schema import Trace
from predictors.base import Forecast, Predictor, Request
from predictors.blend import Blend
from predictors.eamc import Eamc
from predictors.finemoe import FineMoE
from predictors.forecaster import Forecaster
from predictors.markov import Markov
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.semantic import Semantic
from predictors.task import Task
from predictors.trajectory import Trajectory
from tests.predictors.fakes import WordEmbedder, make_trace, random_traces

QUIET = {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
MAKERS: dict[str, Callable[[], Predictor]] = {
    "popularity": Popularity,
    "previous_token": PreviousToken,
    "forecaster": lambda: Forecaster(hidden_dim=16, epochs=1, trainer=QUIET),
    "eamc": Eamc,
    "markov": Markov,
    "semantic": lambda: Semantic(embedder=WordEmbedder()),
    "semantic as in the paper": lambda: Semantic(
        embedder=WordEmbedder(),
        granularity="request",
        neighbours=1,
        centre=False,
        adapt_tokens=None,
    ),
    "trajectory": lambda: Trajectory(prefetch_distance=1),
    "finemoe": lambda: FineMoE(embedder=WordEmbedder(), prefetch_distance=1, capacity=50),
    "blend": lambda: Blend(
        members={
            "semantic": Semantic(embedder=WordEmbedder()),
            "previous_token": PreviousToken(),
            "popularity": Popularity(),
        }
    ),
    "task": lambda: Task(
        hidden_size=8, depth=1, window=2, epochs=1, trainer={"accelerator": "cpu"}
    ),
}


def equal(one: Forecast | None, other: Forecast | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.next_LE, other.next_LE) and torch.equal(
        one.forecast_LE, other.forecast_LE
    )


def with_other_future(trace: Trace, t: int) -> Trace:
    """The same request, but from row ``t`` on every token is expert 3's."""
    ids_TLK, tokens_P = trace.topk_expert_ids_TLK.copy(), trace.token_ids_P.copy()  # type: ignore[union-attr]
    ids_TLK[t:] = 3
    tokens_P[t + 1 :] = 3  # row t's own input token is known before it is routed
    return replace(trace, topk_expert_ids_TLK=ids_TLK, token_ids_P=tokens_P)


def future_changes(predictor: Predictor) -> list[bool]:
    trace = make_trace("new", [0, 1, 0, 2, 1, 0, 0, 1])
    told = predictor.walk(trace, with_truth=predictor.needs_truth).forecasts
    other = predictor.walk(with_other_future(trace, 5), with_truth=predictor.needs_truth).forecasts
    return [not equal(a, b) for a, b in zip(told, other, strict=True)]


@pytest.mark.parametrize("name", MAKERS)
def test_forecasts_depend_on_the_past_alone(name: str) -> None:
    predictor = MAKERS[name]()
    predictor.fit(random_traces())
    assert not any(future_changes(predictor)[:6])


def test_the_planted_future_is_seen_by_the_oracle() -> None:
    """The control of the test above: its signal is visible to whoever looks."""
    predictor = Oracle()
    predictor.fit(random_traces())
    assert any(future_changes(predictor)[:6])


@pytest.mark.parametrize("name", MAKERS)
def test_two_requests_in_turn_do_not_share_a_past(name: str) -> None:
    predictor = MAKERS[name]()
    predictor.fit(random_traces())
    first = make_trace("first", [3] * 30, prompt="ships")
    second = make_trace("second", [0, 1, 0, 1], prompt="cats")
    alone = predictor.walk(second).forecasts
    predictor.walk(first)
    assert all(equal(a, b) for a, b in zip(alone, predictor.walk(second).forecasts, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_interleaved_requests_say_what_each_would_alone(name: str) -> None:
    predictor = MAKERS[name]()
    predictor.fit(random_traces())
    traces = [make_trace("a", [3] * 5, prompt="ships"), make_trace("b", [0, 1, 0, 1, 2])]
    states = [predictor.new_state() for _ in traces]
    said = [
        [predictor.on_request(state, Request.of(trace))]
        for state, trace in zip(states, traces, strict=True)
    ]
    for t in range(4):
        for i, trace in enumerate(traces):
            map_LE = torch.from_numpy(trace.expert_map_LE(t, 4))
            now, then = (int(token) for token in trace.topk_expert_ids_TLK[t : t + 2, 0, 0])
            told = predictor.on_token(states[i], map_LE, token_id=now, next_token_id=then)
            said[i].append(told)
    for i, trace in enumerate(traces):
        alone = Predictor.walk(predictor, trace).forecasts  # token by token, to the bit
        assert all(equal(a, b) for a, b in zip(said[i], alone, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_shown_together_say_what_they_say_one_by_one(name: str) -> None:
    predictor = MAKERS[name]()
    predictor.fit(random_traces())
    trace = make_trace("new", [0, 1, 0, 2, 1, 0, 0, 1])
    ids = trace.topk_expert_ids_TLK[:, 0, 0].tolist()
    maps_TLE = torch.stack([torch.from_numpy(trace.expert_map_LE(t, 4)) for t in range(8)])
    together, singly = predictor.new_state(), predictor.new_state()
    for state in (together, singly):
        predictor.on_request(state, Request.of(trace))
    told = predictor.on_tokens(
        together, maps_TLE[:5], token_ids_T=ids[:5], next_token_ids_T=ids[1:6]
    )
    for t in range(5):
        one = predictor.on_token(singly, maps_TLE[t], token_id=ids[t], next_token_id=ids[t + 1])
    assert together.num_tokens == singly.num_tokens == 5
    after = [
        predictor.on_token(state, maps_TLE[5], token_id=ids[5], next_token_id=ids[6])
        for state in (together, singly)
    ]
    for batched, single in ((told, one), after):
        assert (batched is None) == (single is None)
        if batched is not None and single is not None:
            torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_a_test_request_changes_nothing_that_is_learned(name: str) -> None:
    """FineMoE's demo stores the very prompt that it evaluates; here no test row may matter."""
    traces = random_traces()
    poisoned = replace(
        traces,
        traces=[
            replace(trace, topk_expert_ids_TLK=np.full_like(trace.topk_expert_ids_TLK, 2))
            if traces.split[trace.request_id] == "test"
            else trace
            for trace in traces.traces
        ],
    )
    clean, other = MAKERS[name](), MAKERS[name]()
    clean.fit(traces)
    other.fit(poisoned)
    learned, again = clean.tensors(), other.tensors()
    assert learned
    assert all(torch.equal(tensor, again[key]) for key, tensor in learned.items())
