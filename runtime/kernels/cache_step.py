"""One layer's cache event in one launch: `runtime.cache.ExpertCache.step` as a Triton kernel.

One program decides everything, so it needs no atomics. Where the reference sorts, this compares all
pairs of experts (`runtime.kernels.pairs`).

Knows nothing of bytes: an expert's place is a number of neurons and an address.

Shape letters: E experts per layer · N expert ids of a token batch · A entries of the active list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.pairs import blocks, hand_on_slots, order_key, sum_below


@triton.jit
def _event(
    ids_N,
    num_ids,
    num_experts,
    capacity,
    num_neurons,
    slot_neurons,
    slot_base,
    slot_bytes,
    used_1,
    step_1,
    resident_E,
    slot_of_E,
    last_use_E,
    inserted_E,
    use_count_E,
    visits_E,
    prefetched_E,
    displaced_E,
    needed_E,
    keep_E,
    present_E,
    home_E,
    address_E,
    num_active_1,
    active_expert_A,
    active_slot_A,
    active_present_A,
    counters_X,
    E_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    LAST_USE: tl.constexpr,
    INSERTED: tl.constexpr,
    USE_COUNT: tl.constexpr,
    VISITS: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    e = tl.arange(0, E_BLOCK)
    inside = e < num_experts
    needed = tl.zeros([E_BLOCK], tl.int32)
    for start in range(0, num_ids, N_BLOCK):
        n = start + tl.arange(0, N_BLOCK)
        ids = tl.load(ids_N + n, mask=n < num_ids, other=-1).to(tl.int32)
        same = (ids[None, :] == e[:, None]).to(tl.int32)
        needed = tl.maximum(needed, tl.max(same, 1))
    needed = tl.where(inside, needed, 0)
    resident = tl.load(resident_E + e, mask=inside, other=0).to(tl.int32)
    slot = tl.load(slot_of_E + e, mask=inside, other=-1).to(tl.int32)
    keep = tl.load(keep_E + e, mask=inside, other=0.0)
    present = tl.load(present_E + e, mask=inside, other=0)
    home = tl.load(home_E + e, mask=inside, other=0)
    used = tl.load(used_1).to(tl.int32)
    step = tl.load(step_1)

    hit = needed * resident
    miss = needed * (1 - resident)
    num_needed, num_hits = tl.sum(needed, 0), tl.sum(hit, 0)
    num_misses = num_needed - num_hits
    room = capacity - num_hits
    insert = tl.where(tl.cumsum(miss, 0) <= room, miss, 0)
    num_inserts = tl.sum(insert, 0)

    # The lowest keep-scores go, ties by id: whose rank among the evictable is small enough.
    over = used + num_inserts - capacity
    evictable = resident * (1 - needed)
    evict = tl.zeros([E_BLOCK], tl.int32)
    if over > 0:
        key = order_key(keep, e, evictable)
        evict = tl.where(sum_below(key, evictable, COLUMNS) < over, evictable, 0)
    num_evictions = tl.sum(evict, 0)
    slot = hand_on_slots(slot, insert, evict, used, COLUMNS)
    resident = resident * (1 - evict) + insert
    tl.store(used_1, (used + num_inserts - num_evictions).to(tl.int64))
    tl.store(resident_E + e, resident.to(tl.int8), mask=inside)
    tl.store(slot_of_E + e, slot.to(tl.int64), mask=inside)
    tl.store(needed_E + e, needed.to(tl.int8), mask=inside)
    if LAST_USE:
        tl.store(last_use_E + e, tl.zeros([E_BLOCK], tl.int64) + step, mask=needed == 1)
    if INSERTED:
        tl.store(inserted_E + e, tl.zeros([E_BLOCK], tl.int64) + step, mask=insert == 1)
    if USE_COUNT:
        count = tl.load(use_count_E + e, mask=inside, other=0)
        tl.store(use_count_E + e, count + needed, mask=inside)
    if VISITS:  # a stay ends with an eviction; what streams never stays
        visits = tl.load(visits_E + e, mask=inside, other=0)
        tl.store(visits_E + e, (visits + needed) * resident, mask=inside)
    if PREFETCHED:
        unused = tl.load(prefetched_E + e, mask=inside, other=0).to(tl.int32)
        wasted, came_true = unused * evict, unused * needed
        unused = unused * (1 - needed) * (1 - evict)
        tl.store(prefetched_E + e, unused.to(tl.int8), mask=inside)
        tl.store(counters_X + 8, tl.load(counters_X + 8) + tl.sum(wasted, 0))
        tl.store(counters_X + 9, tl.load(counters_X + 9) + tl.sum(wasted * present, 0))
        tl.store(counters_X + 10, tl.load(counters_X + 10) + tl.sum(came_true * present, 0))
        # What has gone for nothing so far is missed as long as that lasts.
        displaced = tl.load(displaced_E + e, mask=inside, other=0).to(tl.int32)
        tl.store(counters_X + 12, tl.load(counters_X + 12) + tl.sum(displaced * miss, 0))
        displaced *= (1 - needed) * tl.max(unused, 0)
        tl.store(displaced_E + e, displaced.to(tl.int8), mask=inside)

    # Where the expert kernel finds what: misses first, so that the link is busy from the start.
    slot_address = tl.where(resident == 1, slot_base + slot.to(tl.int64) * slot_bytes, 0)
    at = tl.where(miss == 1, tl.cumsum(miss, 0) - 1, num_misses + tl.cumsum(hit, 0) - 1)
    tl.store(num_active_1, num_needed)
    tl.store(active_expert_A + at, e, mask=needed == 1)
    tl.store(active_slot_A + at, slot_address, mask=needed == 1)
    tl.store(active_present_A + at, tl.where(hit == 1, present, 0), mask=needed == 1)
    tl.store(address_E + e, tl.where(resident == 1, slot_address, home), mask=inside)
    # Whatever the event needs and has a slot for is complete once the expert kernel has run.
    filled = tl.where(evict == 1, 0, tl.where(needed * resident == 1, slot_neurons, present))
    tl.store(present_E + e, filled, mask=inside)

    missed = tl.sum(tl.where(needed == 1, num_neurons - tl.where(hit == 1, present, 0), 0), 0)
    tl.store(counters_X + 0, tl.load(counters_X + 0) + num_needed)
    tl.store(counters_X + 1, tl.load(counters_X + 1) + num_hits)
    tl.store(counters_X + 2, tl.load(counters_X + 2) + num_misses)
    tl.store(counters_X + 3, tl.load(counters_X + 3) + num_misses - num_inserts)
    tl.store(counters_X + 4, tl.load(counters_X + 4) + num_evictions)
    tl.store(counters_X + 5, tl.load(counters_X + 5) + missed)


def cache_step(  # noqa: D417 (the others are the state of `DeviceCache`)
    topk_expert_ids_TK: Tensor,
    *,
    capacity: int,
    num_neurons: int,
    slot_neurons: int,
    slot_base: int,
    slot_bytes: int,
    uses: frozenset[str],
    used_1: Tensor,
    step_1: Tensor,
    resident_E: Tensor,
    slot_of_E: Tensor,
    last_use_E: Tensor,
    inserted_E: Tensor,
    use_count_E: Tensor,
    visits_E: Tensor,
    prefetched_E: Tensor | None,
    displaced_E: Tensor | None,
    needed_E: Tensor,
    keep_E: Tensor,
    present_E: Tensor,
    home_E: Tensor,
    address_E: Tensor,
    num_active_1: Tensor,
    active_expert_A: Tensor,
    active_slot_A: Tensor,
    active_present_A: Tensor,
    counters_X: Tensor,
) -> None:
    """Serve one event of one layer, in place; the tensors are `runtime.device_cache.DeviceCache`'s.

    Args:
        topk_expert_ids_TK: Experts of each token; ids of E and above are skipped.
        capacity: C.
        num_neurons: F.
        slot_neurons: How many of an expert's neurons a slot holds.
        slot_base: Address of slot 0.
        slot_bytes: From one slot to the next.
        uses: The fields of usage that the policy reads.
        prefetched_E: What was prefetched and not used yet; None without prefetch.
        displaced_E: What has gone for it; likewise.
    """
    num_experts = resident_E.shape[0]
    ids_N = topk_expert_ids_TK.reshape(-1)
    e_block, columns, num_warps = blocks(num_experts)
    _event[(1,)](
        ids_N,
        ids_N.shape[0],
        num_experts,
        capacity,
        num_neurons,
        slot_neurons,
        slot_base,
        slot_bytes,
        used_1,
        step_1,
        resident_E.view(torch.int8),
        slot_of_E,
        last_use_E,
        inserted_E,
        use_count_E,
        visits_E,
        None if prefetched_E is None else prefetched_E.view(torch.int8),
        None if displaced_E is None else displaced_E.view(torch.int8),
        needed_E.view(torch.int8),
        keep_E,
        present_E,
        home_E,
        address_E,
        num_active_1,
        active_expert_A,
        active_slot_A,
        active_present_A,
        counters_X,
        E_BLOCK=e_block,
        COLUMNS=columns,
        N_BLOCK=16,
        LAST_USE="last_use" in uses,
        INSERTED="inserted" in uses,
        USE_COUNT="use_count" in uses,
        VISITS="visits" in uses,
        PREFETCHED=prefetched_E is not None,
        num_warps=num_warps,
    )
