"""A predictor behind a searcher costs a forward pass nothing, whatever it does."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import spec_of
from data.schema import TraceList
from predictors.base import Forecast, Predictor, Request, State
from predictors.finemoe import FineMoE
from predictors.searcher import AsyncSearcher
from runtime.engine import attach
from tests.families import tiny_model

SLEEP_S = 0.2
NUM_NEW = 10
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Sleepy(FineMoE):
    """Searches as slowly as the paper's authors would dare to fear."""

    def on_request(self, state: State, request: Request) -> Forecast | None:
        time.sleep(SLEEP_S)
        return super().on_request(state, request)

    def on_token(self, state: State, expert_map_LE: Tensor, **ids: Any) -> Forecast | None:
        time.sleep(SLEEP_S)
        return super().on_token(state, expert_map_LE, **ids)


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


def fitted(model: Any, kind: type[FineMoE]) -> FineMoE:
    predictor = kind(online=True, prefetch_distance=1)
    predictor.fit(TraceList(spec=spec_of(model), traces=[], split={}, digest=""))
    return predictor


def generate(model: Any) -> Tensor:
    ids: Tensor = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False
    )
    return ids


def timed(model: Any, predictor: Predictor) -> tuple[Tensor, float]:
    """Tokens, and the seconds that they took with every expert resident: nothing is missed."""
    num_experts = spec_of(model).num_experts
    with attach(model, policy="forecast", slots=num_experts, predictor=predictor) as offload:
        generate(model)  # fills the slots
        misses = offload.stats().misses
        started_s = time.perf_counter()
        ids = generate(model)
        elapsed_s = time.perf_counter() - started_s
        assert offload.stats().misses == misses
    return ids, elapsed_s


def test_a_search_of_200_ms_does_not_delay_a_forward_pass_without_misses(model: Any) -> None:
    """At least one search a pass: to wait for half of them would be seen."""
    plain = generate(model)
    waiting_ids, waiting_s = timed(model, fitted(model, Sleepy))
    with AsyncSearcher(fitted(model, Sleepy)) as searcher:
        ids, elapsed_s = timed(model, searcher)
        # Two requests, each told once and then token by token, but for the last one.
        assert searcher.stats.num_published == 2 * (len(PROMPT) + NUM_NEW - 1)
    assert torch.equal(ids, plain)
    assert torch.equal(waiting_ids, plain)
    assert waiting_s >= NUM_NEW * SLEEP_S
    assert elapsed_s < NUM_NEW * SLEEP_S / 2


def test_a_store_fills_behind_a_running_model(model: Any) -> None:
    predictor = fitted(model, FineMoE)
    with AsyncSearcher(predictor) as searcher:
        ids, _ = timed(model, searcher)
        assert searcher.drain(timeout_s=60.0)
        assert searcher.stats.num_failed == 0
        assert 0 < len(predictor.store) <= 2 * (len(PROMPT) + NUM_NEW)
    assert torch.equal(ids, generate(model))
