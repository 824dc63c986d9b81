"""Plans become slots that fit their memory to the byte, and nothing else is taken for a split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.adapters import spec_of
from runtime.expert_layout import ExpertLayout
from runtime.slot_pool import SlotPool
from runtime.slot_split import SlotSplit, slot_bytes
from runtime.split_budget import SplitPlan
from tests.families import tiny_model

E, F = 8, 320


def layout(neurons: int = F, *, has_bias: bool = True) -> ExpertLayout:
    return ExpertLayout(
        hidden_size=24,
        expert_intermediate_size=neurons,
        dtype=torch.bfloat16,
        has_gate=True,
        has_bias=has_bias,
        is_transposed=False,
        is_concatenated=True,
    )


def plan(*layers: tuple[float, int]) -> SplitPlan:
    memory_L, cached_L = (np.array(column) for column in zip(*layers, strict=True))
    return SplitPlan(memory_L.astype(float), cached_L.astype(np.int64), np.zeros(len(layers)))


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.tuples(st.floats(0.05, E), st.integers(1, E)), min_size=1, max_size=5),
    has_bias=st.booleans(),
)
def test_a_plan_never_takes_more_than_its_memory_and_is_followed_to_the_chunk(
    layers: list[tuple[float, int]], has_bias: bool
) -> None:
    shape = layout(has_bias=has_bias)
    layers = [(memory, max(cached, int(np.ceil(memory)))) for memory, cached in layers]
    wanted = plan(*layers)
    budget_bytes = int(wanted.memory_L.sum() * shape.record_bytes + 1e-6)
    if budget_bytes < len(layers) * slot_bytes(64, shape):
        with pytest.raises(ValueError, match=f"{budget_bytes} bytes for slots"):
            SlotSplit.of_plan(wanted, shape)
        return
    split = SlotSplit.of_plan(wanted, shape)
    assert split.num_bytes(shape) <= budget_bytes
    is_even = all(memory * F >= 64 * cached for memory, cached in layers)
    for count, neurons, (memory, cached) in zip(split.slots, split.neurons, layers, strict=True):
        assert 1 <= count <= cached
        assert neurons == F or neurons % 64 == 0
        if is_even:  # a chunk of each: nobody goes without
            assert count == cached
            assert abs(neurons - min(1, memory / cached) * F) < 64


def test_what_rounding_leaves_thickens_the_tops_that_lost_most() -> None:
    shape = layout(has_bias=False)
    wanted = plan((4.0, 4), (3.8, 4), (2.1, 4))  # 320, 304 and 168 neurons each
    split = SlotSplit.of_plan(wanted, shape)
    assert split == SlotSplit(slots=(4, 4, 4), neurons=(320, 320, 128)), "4 * (48 + 40) were left"
    least_bytes = split.num_bytes(shape) - 4 * slot_bytes(64, shape)
    for spare_bytes, neurons in ((0, (320, 256, 128)), (4 * slot_bytes(64, shape), split.neurons)):
        cut = SlotSplit.of_plan(wanted, shape, num_bytes=least_bytes + spare_bytes)
        assert cut.neurons == neurons


@pytest.mark.parametrize(
    ("slots", "neurons", "message"),
    [
        ((2, 2), (64,), "slots of 2 layers, neurons of 1"),
        ((2, 0, 2), (64, 64, 64), "slots=.*at least 1 in every layer"),
        ((), (), "at least 1 in every layer"),
        ((2, 2), (64, 64), "split of 2 layers"),
        ((2, 9, 2), (64, 64, 64), "slots=9: a layer has 8 experts"),
        ((2, 2, 2), (64, 100, 64), "layer 1: neurons=100 must be F=320 or a multiple of 64"),
        ((2, 2, 2), (64, 64, 384), "layer 2: neurons=384"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    slots: tuple[int, ...], neurons: tuple[int, ...], message: str
) -> None:
    spec = spec_of(tiny_model("mixtral"))
    with pytest.raises(ValueError, match=message):
        SlotSplit(slots=slots, neurons=neurons).check(spec, layout())


def test_a_pool_is_cut_without_gaps_or_overlaps_and_no_further_than_it_reaches() -> None:
    shape, device = layout(), torch.device("cpu")
    first = SlotSplit(slots=(2, 3), neurons=(F, 128))
    pool = SlotPool(first, shape, device)
    for split in (first, SlotSplit(slots=(8, 1), neurons=(64, 256))):
        memory = pool.memory(split)
        slots_LCP = pool.cut(split)
        for slots_CP, of_layer, neurons in zip(slots_LCP, memory, split.neurons, strict=True):
            assert of_layer.base_address == slots_CP.data_ptr()
            assert of_layer.base_address % 64 == 0
            assert of_layer.slot_bytes == slot_bytes(neurons, shape)
            assert (of_layer.num_slots, of_layer.slot_neurons) == (len(slots_CP), neurons)
        for value, slots_CP in enumerate(slots_LCP):
            slots_CP.fill_(value)
        assert [float(slots_CP.float().mean()) for slots_CP in slots_LCP] == [0.0, 1.0]
        assert sum(slots_CP.nbytes for slots_CP in slots_LCP) == split.num_bytes(shape)
    with pytest.raises(ValueError, match="there is memory for"):
        pool.cut(SlotSplit(slots=(8, 8), neurons=(F, F)))
