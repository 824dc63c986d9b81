"""A budget is of everything on the device, and an impossible one says what would do."""

import copy
from typing import Any

import pytest
import torch

from data.adapters import moe_layers, spec_of
from runtime.footprint import Footprint, footprint, skeleton
from runtime.gpu_memory import gpu_slots_for_bytes, plan_memory
from tests.families import FAMILIES, tiny_model


def counted(*, context: int = 64, batch: int = 1, family: str = "qwen3_moe") -> Footprint:
    config = copy.deepcopy(tiny_model(family).config)
    return footprint(skeleton(config, torch.float32), context=context, batch=batch, chunk_tokens=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_stays_within_the_budget_and_wastes_no_slot(family: str) -> None:
    model = counted(family=family)
    roomy = plan_memory(model, 1 << 40)
    assert roomy.slots == model.spec.num_experts
    assert roomy.staging_bytes == 0
    for slots in range(model.spec.top_k, model.spec.num_experts):
        exact = plan_memory(model, None, slots=slots).total_bytes
        for budget in (exact, exact + roomy.slot_bytes - 1):
            tight = plan_memory(model, budget)
            assert tight.total_bytes <= budget
            # Without staging buffers, all experts may take less than most of them.
            fits_whole = roomy.total_bytes <= budget
            assert tight.slots == (model.spec.num_experts if fits_whole else slots)


def test_an_impossible_budget_is_refused_with_the_smallest_possible() -> None:
    model = counted()
    least = plan_memory(model, None, slots=model.spec.top_k).total_bytes
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        plan_memory(model, least - 1)
    plan = plan_memory(model, least)
    assert plan.slots == model.spec.top_k
    assert plan.least_bytes == least


def test_a_longer_context_and_more_requests_leave_fewer_slots() -> None:
    budget = plan_memory(counted(), None, slots=8).total_bytes
    assert plan_memory(counted(), budget).slots == 8
    assert plan_memory(counted(context=128), budget).slots < 8
    assert plan_memory(counted(batch=2), budget).slots < 8


def test_what_comes_ahead_of_its_use_takes_slots_but_none_of_what_is_resident_anyway() -> None:
    model = counted()
    budget = plan_memory(model, None, slots=8).total_bytes
    plan = plan_memory(model, budget, prefetch_bytes=3 * model.layout.record_bytes)
    assert plan.slots < 8
    assert plan.total_bytes <= budget
    whole = plan_memory(model, 1 << 40, prefetch_bytes=3 * model.layout.record_bytes)
    assert whole.prefetch_bytes == 0


def test_a_gpu_that_is_nearly_full_says_both_numbers() -> None:
    model = counted()
    budget = plan_memory(model, None, slots=8).total_bytes
    assert plan_memory(model, budget, free_bytes=budget).slots == 8
    with pytest.raises(ValueError, match=f"budget_bytes={budget} .* only {budget - 1} bytes"):
        plan_memory(model, budget, free_bytes=budget - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_bytes": None}, "exactly one"),
        ({"budget_bytes": 1, "slots": 4}, "exactly one"),
        ({"budget_bytes": None, "slots": 3}, "slots=3"),
        ({"budget_bytes": None, "slots": 17}, "slots=17"),
        ({"budget_bytes": 1 << 40, "staging_buffers": 0}, "staging_buffers=0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    budget = arguments.pop("budget_bytes")
    with pytest.raises(ValueError, match=message):
        plan_memory(counted(), budget, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_only_looked_at(family: str) -> None:
    model = tiny_model(family)
    layers, spec = moe_layers(model), spec_of(model)
    before = model.config._experts_implementation
    assert gpu_slots_for_bytes(model, layers, spec, 1 << 40) == spec.num_experts
    with pytest.raises(ValueError, match="at least"):
        gpu_slots_for_bytes(model, layers, spec, 1000)
    assert model.config._experts_implementation == before


def test_a_longer_context_leaves_fewer_slots() -> None:
    model = tiny_model("qwen3_moe", max_position_embeddings=1 << 20)
    layers, spec = moe_layers(model), spec_of(model)

    def slots(context_tokens: int) -> int:
        return gpu_slots_for_bytes(model, layers, spec, 300 << 20, context_tokens=context_tokens)

    assert slots(4096) == spec.num_experts
    with pytest.raises(ValueError, match="1000000 tokens of context"):
        slots(1_000_000)
