"""One layer's prefetch in one launch: `runtime.cache.ExpertCache.prefetch` as a Triton kernel.

It decides who comes, who goes and how much of whom is copied, keeps the books accordingly and
writes down the copies, which `runtime.kernels.copy` then makes. One program, so no atomics.

Shape letters: E experts per layer · N copies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.pairs import blocks, hand_on_slots, offered_at, order_key, sum_below


@triton.jit
def _portion(missing, before, max_neurons, CHUNK: tl.constexpr):
    """Neurons that are fetched of each: what is missing, or the whole chunks that are left."""
    left = tl.maximum(max_neurons - before, 0)
    return tl.where(missing <= left, missing, left // CHUNK * CHUNK)


@triton.jit
def _prefetch(
    want_E,
    forecast_E,
    victims_by_E,
    protected_E,
    margin,
    max_fetches,
    allowance_1,
    left_1,
    num_experts,
    capacity,
    num_neurons,
    slot_neurons,
    slot_base,
    slot_bytes,
    neuron_bytes,
    record_bytes,
    used_1,
    step_1,
    resident_E,
    slot_of_E,
    last_use_E,
    inserted_E,
    visits_E,
    prefetched_E,
    displaced_E,
    present_E,
    home_E,
    address_E,
    arrived_E,
    source_N,
    target_N,
    num_bytes_N,
    num_copies,
    counters_X,
    E_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DUE: tl.constexpr,
    VICTIMS_BY: tl.constexpr,
    PROTECTED: tl.constexpr,
    INSERTED: tl.constexpr,
    VISITS: tl.constexpr,
):
    e = tl.arange(0, E_BLOCK)
    inside = e < num_experts
    want = tl.load(want_E + e, mask=inside, other=0).to(tl.int32)
    forecast = tl.load(forecast_E + e, mask=inside, other=0.0)
    resident = tl.load(resident_E + e, mask=inside, other=0).to(tl.int32)
    slot = tl.load(slot_of_E + e, mask=inside, other=-1).to(tl.int32)
    present = tl.load(present_E + e, mask=inside, other=0)
    home = tl.load(home_E + e, mask=inside, other=0)
    unused = tl.load(prefetched_E + e, mask=inside, other=0).to(tl.int32)
    displaced = tl.load(displaced_E + e, mask=inside, other=0).to(tl.int32)
    used = tl.load(used_1).to(tl.int32)
    max_neurons = tl.load(allowance_1)
    # `advance` has counted an event that is due; for the books it is not there yet.
    step = tl.load(step_1) - IS_DUE
    evictable = resident
    if PROTECTED:
        evictable *= 1 - tl.load(protected_E + e, mask=inside, other=0).to(tl.int32)

    # In the order of forecasts, everything wanted that is not there in full. A newcomer of which
    # nothing would be copied does not come. Others that do not come were never ahead of one that
    # does, so that they leave no gap in what is copied before it.
    missing = tl.where(want == 1, slot_neurons - present, 0)
    wanted = (missing > 0).to(tl.int32)
    key = order_key(-forecast, e, wanted)
    portion = _portion(missing, sum_below(key, missing, COLUMNS), max_neurons, CHUNK)
    is_first = (sum_below(key, wanted, COLUMNS) < max_fetches) & (portion > 0)
    candidate = tl.where(is_first, wanted * (1 - resident), 0)

    # The j-th newcomer takes a free slot, or beats victim j - free by the margin.
    free = capacity - used
    newcomer_key = order_key(-forecast, e, candidate)
    place = tl.where(candidate == 1, sum_below(newcomer_key, candidate, COLUMNS) - free, -1)
    victim_key = order_key(forecast, e, evictable)
    victim_rank = sum_below(victim_key, evictable, COLUMNS)
    offered_place = tl.where(evictable == 1, victim_rank, -2)
    victim_forecast = offered_at(place, offered_place, forecast, COLUMNS)
    beats = (place < tl.sum(evictable, 0)) & (forecast > victim_forecast + margin)
    insert = tl.where((place < 0) | beats, candidate, 0)
    num_inserts = tl.sum(insert, 0)
    num_evictions = tl.maximum(num_inserts - free, 0)
    if VICTIMS_BY:  # in another order, among those that all who come beat
        least = tl.min(tl.where(insert == 1, forecast, float("inf")), 0)
        evictable = tl.where(least > forecast + margin, evictable, 0)
        victim_score = tl.load(victims_by_E + e, mask=inside, other=0.0)
        victim_key = order_key(victim_score, e, evictable)
        victim_rank = sum_below(victim_key, evictable, COLUMNS)
    evict = tl.where(victim_rank < num_evictions, evictable, 0)

    slot = hand_on_slots(slot, insert, evict, used, COLUMNS)
    stays = resident * (1 - evict)
    resident = stays + insert
    tl.store(used_1, (used + num_inserts - num_evictions).to(tl.int64))
    tl.store(resident_E + e, resident.to(tl.int8), mask=inside)
    tl.store(slot_of_E + e, slot.to(tl.int64), mask=inside)
    tl.store(arrived_E + e, insert.to(tl.int8), mask=inside)
    tl.store(prefetched_E + e, (unused * (1 - evict) | insert).to(tl.int8), mask=inside)
    displaced = (displaced | evict) * (1 - insert)
    tl.store(displaced_E + e, displaced.to(tl.int8), mask=inside)
    tl.store(last_use_E + e, tl.zeros([E_BLOCK], tl.int64) + step, mask=insert == 1)
    if INSERTED:
        tl.store(inserted_E + e, tl.zeros([E_BLOCK], tl.int64) + step, mask=insert == 1)
    if VISITS:
        tl.store(visits_E + e, tl.zeros([E_BLOCK], tl.int64), mask=evict == 1)
    slot_address = tl.where(resident == 1, slot_base + slot.to(tl.int64) * slot_bytes, home)
    tl.store(address_E + e, slot_address, mask=inside)

    # Newcomers, and what an earlier prefetch has left half-way: copy, from where it ends.
    fetched = wanted * (insert | stays)
    fetched_key = order_key(-forecast, e, fetched)
    nth = sum_below(fetched_key, fetched, COLUMNS)
    before = sum_below(fetched_key, missing * fetched, COLUMNS)
    portion = _portion(missing * fetched, before, max_neurons, CHUNK)
    portion = tl.where(nth < max_fetches, portion, 0)
    is_whole = present + portion == num_neurons  # then the biases behind its neurons come, too
    tail_bytes = tl.where(is_whole, record_bytes - num_neurons * neuron_bytes, 0)
    num_bytes = portion.to(tl.int64) * neuron_bytes + tail_bytes
    start_bytes = present.to(tl.int64) * neuron_bytes
    n = tl.arange(0, N_BLOCK)
    num_fetched = tl.sum((portion > 0).to(tl.int32), 0)
    tl.store(source_N + nth, home + start_bytes, mask=portion > 0)
    tl.store(target_N + nth, slot_address + start_bytes, mask=portion > 0)
    tl.store(num_bytes_N + nth, num_bytes, mask=portion > 0)
    tl.store(
        num_bytes_N + n, tl.zeros([N_BLOCK], tl.int64), mask=(n >= num_fetched) & (n < num_copies)
    )
    tl.store(present_E + e, tl.where(evict == 1, 0, present + portion), mask=inside)
    tl.store(left_1, max_neurons - tl.sum(portion, 0))

    wasted = unused * evict
    tl.store(counters_X + 4, tl.load(counters_X + 4) + num_evictions)
    tl.store(counters_X + 6, tl.load(counters_X + 6) + num_inserts)
    tl.store(counters_X + 7, tl.load(counters_X + 7) + tl.sum(portion, 0))
    tl.store(counters_X + 8, tl.load(counters_X + 8) + tl.sum(wasted, 0))
    tl.store(counters_X + 9, tl.load(counters_X + 9) + tl.sum(wasted * present, 0))
    tl.store(counters_X + 11, tl.load(counters_X + 11) + num_evictions)


def cache_prefetch(  # noqa: D417 (the others are the state of `DeviceCache`, in place)
    *,
    want_E: Tensor,
    forecast_E: Tensor,
    victims_by_E: Tensor | None,
    protected_E: Tensor | None,
    margin: float,
    max_fetches: int,
    allowance_1: Tensor,
    left_1: Tensor,
    is_due: bool,
    capacity: int,
    num_neurons: int,
    slot_neurons: int,
    slot_base: int,
    slot_bytes: int,
    neuron_bytes: int,
    record_bytes: int,
    chunk_neurons: int,
    uses: frozenset[str],
    used_1: Tensor,
    step_1: Tensor,
    resident_E: Tensor,
    slot_of_E: Tensor,
    last_use_E: Tensor,
    inserted_E: Tensor,
    visits_E: Tensor,
    prefetched_E: Tensor,
    displaced_E: Tensor,
    present_E: Tensor,
    home_E: Tensor,
    address_E: Tensor,
    arrived_E: Tensor,
    source_address_N: Tensor,
    target_address_N: Tensor,
    num_bytes_N: Tensor,
    counters_X: Tensor,
) -> None:
    """Decide one prefetch; what it does is said in `runtime.device_prefetch.DevicePrefetch.fetch`.

    Args:
        want_E: bool.
        forecast_E: float32.
        victims_by_E: float32, or None: the forecast.
        protected_E: bool, or None.
        margin: By how much a forecast must beat its victim's.
        max_fetches: The most copies.
        allowance_1: int32, the most neurons of all copies together.
        left_1: int32, what is left of it; written, and may be the same tensor.
        is_due: The layer's event of this forward pass is still to come.
        capacity: C.
        num_neurons: F.
        slot_neurons: How many of an expert's neurons a slot holds.
        slot_base: Address of slot 0.
        slot_bytes: From one slot to the next.
        neuron_bytes: Of one neuron in a record.
        record_bytes: Of a record.
        chunk_neurons: A prefix ends at a multiple of it, or at the slot's end.
        uses: The fields of usage that the policy reads.
        displaced_E: bool, who has gone for something that is not used yet.
        arrived_E: bool, who came; written.
        source_address_N: Written, as the next two.
        target_address_N: Into slots.
        num_bytes_N: 0 beyond the last copy.
    """
    num_experts, num_copies = len(resident_E), len(num_bytes_N)
    e_block, columns, num_warps = blocks(num_experts)
    _prefetch[(1,)](
        want_E.view(torch.int8),
        forecast_E,
        victims_by_E,
        None if protected_E is None else protected_E.view(torch.int8),
        margin,
        max_fetches,
        allowance_1,
        left_1,
        num_experts,
        capacity,
        num_neurons,
        slot_neurons,
        slot_base,
        slot_bytes,
        neuron_bytes,
        record_bytes,
        used_1,
        step_1,
        resident_E.view(torch.int8),
        slot_of_E,
        last_use_E,
        inserted_E,
        visits_E,
        prefetched_E.view(torch.int8),
        displaced_E.view(torch.int8),
        present_E,
        home_E,
        address_E,
        arrived_E.view(torch.int8),
        source_address_N,
        target_address_N,
        num_bytes_N,
        num_copies,
        counters_X,
        E_BLOCK=e_block,
        N_BLOCK=triton.next_power_of_2(num_copies),
        COLUMNS=columns,
        CHUNK=chunk_neurons,
        IS_DUE=int(is_due),
        VICTIMS_BY=victims_by_E is not None,
        PROTECTED=protected_E is not None,
        INSERTED="inserted" in uses,
        VISITS="visits" in uses,
        num_warps=num_warps,
    )
