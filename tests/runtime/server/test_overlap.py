"""Those who need the same experts run together, and nobody waits for ever for it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.adapters import spec_of
from data.schema import MoESpec
from data.tiny_moe import TINY_MOE_DIR
from predictors.base import Forecast, Request, State
from runtime.engine import attach
from runtime.server.generation import GenerationEngine
from runtime.server.overlap import OVERLAP, FIFOScheduler, OverlapScheduler, order
from tests.fakes import ScriptedPredictor
from tests.runtime.server.fakes import Listener, submit_one


def uses(*experts: int) -> Tensor:
    use_LE = torch.zeros(1, 8)
    use_LE[0, list(experts)] = 0.9
    return use_LE


KINDS = {"a": uses(0, 1), "b": uses(4, 5), "?": None}


def forecast_of(name: str) -> Tensor | None:
    """By the first letter of the name."""
    return KINDS[name[0]]


def ordered(waiting: list[str], running: list[str], places: int = 2, **kwargs: Any) -> list[str]:
    return order(
        waiting,
        running,
        forecast_of,
        places=places,
        **{"overtaken": {}, "max_overtaken": 3, **kwargs},
    )


def test_those_who_share_experts_with_the_batch_come_first() -> None:
    assert ordered(["b1", "a1", "b2", "a2"], ["a0"]) == ["a1", "a2", "b1", "b2"]
    assert ordered(["b1", "a1", "b2", "a2"], ["b0"]) == ["b1", "b2", "a1", "a2"]


def test_an_empty_batch_begins_with_the_oldest_and_goes_on_with_its_like() -> None:
    assert ordered(["b1", "a1", "a2", "b2"], []) == ["b1", "b2", "a1", "a2"]


def test_equals_and_those_of_whom_nothing_is_known_go_by_arrival() -> None:
    assert ordered(["a1", "a2", "a3"], ["a0"]) == ["a1", "a2", "a3"]
    assert ordered(["?1", "?2"], ["a0"]) == ["?1", "?2"]
    assert ordered(["?1", "?2"], []) == ["?1", "?2"]
    assert ordered(["?1", "b1", "a1"], ["a0"], places=3) == ["a1", "b1", "?1"]


def test_who_was_overtaken_often_enough_is_next() -> None:
    assert ordered(["b1", "a1", "a2"], ["a0"], overtaken={"b1": 2}) == ["a1", "a2", "b1"]
    assert ordered(["b1", "a1", "a2"], ["a0"], overtaken={"b1": 3}) == ["b1", "a1", "a2"]


@pytest.mark.parametrize("places", [1, 2, 5])
def test_an_order_holds_everybody_once(places: int) -> None:
    waiting = ["b1", "?1", "a1", "b2", "a2"]
    assert sorted(ordered(waiting, ["a0"], places=places)) == sorted(waiting)


def test_who_is_cancelled_while_waiting_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = OverlapScheduler.__new__(OverlapScheduler)
    scheduler._overtaken = {}
    scheduler.waiting_requests_order = ["a1", "a2", "b1"]
    monkeypatch.setattr(
        FIFOScheduler,
        "schedule_batch",
        lambda self, *budgets: self.waiting_requests_order.remove("b1"),
    )
    scheduler.schedule_batch(1, 1)
    assert scheduler._overtaken == {"a1": 1, "a2": 1}
    scheduler.waiting_requests_order = ["a2", "b1"]  # the first has hung up
    scheduler.schedule_batch(1, 1)
    assert scheduler._overtaken == {"a2": 2}


class ByPrompt(ScriptedPredictor):
    """Expects the experts that the prompt names."""

    kind = "by_prompt"
    moments = frozenset({"request"})

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec

    def on_request(self, state: State, request: Request) -> Forecast:
        use_LE = torch.full((self.fitted_spec().num_layers, self.fitted_spec().num_experts), 0.01)
        use_LE[:, :8] += 0.9 * (request.prompt == "left")
        use_LE[:, 8:16] += 0.9 * (request.prompt == "right")
        state.forecast = Forecast.stationary(use_LE, gamma=self.gamma)
        return state.forecast

    def on_token(self, state: State, expert_map_LE: Tensor, **kwargs: Any) -> Forecast | None:
        return state.forecast


def test_a_server_groups_requests_by_their_forecasts_and_starves_nobody(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()
    predictor = ByPrompt(spec_of(model))
    with attach(model, policy="forecast", slots=16, predictor=predictor) as offload:
        engine = GenerationEngine(
            model=model,
            tokenizer=tokenizer,
            offload=offload,
            mode="batched",
            max_batch=2,
            scheduler=OVERLAP,
        )
        prompts = ["left", "right"] * 20
        listeners = [Listener() for _ in prompts]
        # All are there before the first step, so that the order is the scheduler's alone.
        generations = [
            submit_one(
                engine,
                listener,
                prompt_ids=[20 + i],
                prompt_text=prompt,
                max_tokens=4,
                ignore_eos=True,
            )
            for i, (prompt, listener) in enumerate(zip(prompts, listeners, strict=True))
        ]
        engine.start()
        for listener in listeners:
            assert len(listener.until_end()) == 4
        engine.shutdown()
    by_start = sorted(generations, key=lambda g: g.timings.started_s or 0.0)
    began = [g.request.prompt_text or "" for g in by_start]
    pairs = list(zip(began[::2], began[1::2], strict=True))  # two run at a time, equally long
    assert all(one == other for one, other in pairs)  # first in, first out would mix each of them
    assert began.index("right") <= 2 + 16  # two places, and the bound on overtaking
    assert sorted(began) == sorted(prompts)
