"""Prefetches that displace nothing: which experts land beside the slots, and which came true.

Two launches a layer, each of one program, so no atomics: `land` decides before the layer's router
has spoken, `claim` afterwards. What they write down, `runtime.kernels.copy` copies.

Shape letters: E experts per layer · N pieces · A entries of an active list · X counters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.device_cache import COUNTERS, Active
from runtime.kernels.pairs import blocks, order_key, sum_below

_PREFETCHED = tl.constexpr(COUNTERS.index("prefetched"))
_PREFETCHED_NEURONS = tl.constexpr(COUNTERS.index("prefetched_neurons"))
_WASTED = tl.constexpr(COUNTERS.index("wasted"))
_WASTED_NEURONS = tl.constexpr(COUNTERS.index("wasted_neurons"))
_USED_NEURONS = tl.constexpr(COUNTERS.index("used_neurons"))
_MISSED_NEURONS = tl.constexpr(COUNTERS.index("missed_neurons"))


@triton.jit
def _land(
    next_E,
    least_1,
    allowance_1,
    left_1,
    resident_E,
    home_E,
    num_experts,
    num_neurons,
    neuron_bytes,
    record_bytes,
    landing,
    expert_N,
    neurons_N,
    source_N,
    target_N,
    num_bytes_N,
    num_pieces,
    counters_X,
    E_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    e = tl.arange(0, E_BLOCK)
    inside = e < num_experts
    probability = tl.load(next_E + e, mask=inside, other=0.0)
    resident = tl.load(resident_E + e, mask=inside, other=1).to(tl.int32)
    allowance = tl.load(allowance_1)
    sure = (probability >= tl.load(least_1)) & (probability > 0)
    wanted = tl.where(inside & sure & (resident == 0), 1, 0)
    place = sum_below(order_key(-probability, e, wanted), wanted, COLUMNS)
    left = tl.maximum(allowance - place * num_neurons, 0)
    portion = tl.where(left >= num_neurons, num_neurons, left // CHUNK * CHUNK)
    portion = tl.where((wanted == 1) & (place < num_pieces), portion, 0)
    n = tl.arange(0, N_BLOCK)
    nothing = (n >= tl.sum((portion > 0).to(tl.int32), 0)) & (n < num_pieces)
    tail_bytes = tl.where(portion == num_neurons, record_bytes - num_neurons * neuron_bytes, 0)
    home = tl.load(home_E + e, mask=inside, other=0)
    comes = portion > 0
    tl.store(expert_N + place, e, mask=comes)
    tl.store(neurons_N + place, portion, mask=comes)
    tl.store(source_N + place, home, mask=comes)
    tl.store(target_N + place, landing + place.to(tl.int64) * record_bytes, mask=comes)
    tl.store(num_bytes_N + place, portion.to(tl.int64) * neuron_bytes + tail_bytes, mask=comes)
    tl.store(neurons_N + n, tl.zeros([N_BLOCK], tl.int32), mask=nothing)
    tl.store(num_bytes_N + n, tl.zeros([N_BLOCK], tl.int64), mask=nothing)
    neurons = tl.sum(portion, 0)
    tl.store(left_1, allowance - neurons)
    came = counters_X + _PREFETCHED
    tl.store(came, tl.load(came) + tl.sum(comes.to(tl.int32), 0))
    came_neurons = counters_X + _PREFETCHED_NEURONS
    tl.store(came_neurons, tl.load(came_neurons) + neurons)


@triton.jit
def _claim(
    expert_N,
    neurons_N,
    landed_bytes_N,
    num_pieces,
    num_active_1,
    active_expert_A,
    active_slot_A,
    active_present_A,
    num_entries,
    target_N,
    num_bytes_N,
    counters_X,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
):
    n = tl.arange(0, N_BLOCK)
    piece = n < num_pieces
    neurons = tl.load(neurons_N + n, mask=piece, other=0)
    expert = tl.load(expert_N + n, mask=piece & (neurons > 0), other=-1)
    landed_bytes = tl.load(landed_bytes_N + n, mask=piece, other=0)
    a = tl.arange(0, A_BLOCK)
    active = (a < tl.load(num_active_1)) & (a < num_entries)
    needed = tl.load(active_expert_A + a, mask=active, other=-2)
    slot = tl.load(active_slot_A + a, mask=active, other=0)
    present = tl.load(active_present_A + a, mask=active, other=0)
    # A piece serves a newcomer; what got no room is read in place, since nothing keeps it.
    serves = (needed[None, :] == expert[:, None]) & (slot != 0)[None, :]
    found = tl.max(serves.to(tl.int32), 1)
    target = tl.sum(tl.where(serves, slot[None, :], 0), 1)
    tl.store(target_N + n, target, mask=piece)
    tl.store(num_bytes_N + n, tl.where(found == 1, landed_bytes, 0), mask=piece)
    given = tl.sum(tl.where(serves, neurons[:, None], 0), 0)
    tl.store(active_present_A + a, tl.maximum(present, given), mask=active)
    used = tl.sum(found * neurons, 0)
    wasted = (1 - found) * (neurons > 0).to(tl.int32)
    used_at, missed_at = counters_X + _USED_NEURONS, counters_X + _MISSED_NEURONS
    wasted_at, wasted_neurons_at = counters_X + _WASTED, counters_X + _WASTED_NEURONS
    tl.store(used_at, tl.load(used_at) + used)
    tl.store(missed_at, tl.load(missed_at) - used)
    tl.store(wasted_at, tl.load(wasted_at) + tl.sum(wasted, 0))
    tl.store(wasted_neurons_at, tl.load(wasted_neurons_at) + tl.sum(wasted * neurons, 0))


def land(
    *,
    next_E: Tensor,
    least_1: Tensor,
    allowance_1: Tensor,
    left_1: Tensor,
    resident_E: Tensor,
    home_E: Tensor,
    num_neurons: int,
    neuron_bytes: int,
    record_bytes: int,
    chunk_neurons: int,
    landing_address: int,
    expert_N: Tensor,
    neurons_N: Tensor,
    source_N: Tensor,
    target_N: Tensor,
    num_bytes_N: Tensor,
    counters_X: Tensor,
) -> None:
    """Choose the absent experts that are likeliest, as far as the allowance goes.

    Args:
        next_E: float32, probabilities.
        least_1: float32, none below it is chosen.
        allowance_1: int32, neurons of all pieces together.
        left_1: int32, what is left of them; written.
        resident_E: bool.
        home_E: int64, addresses of the records.
        num_neurons: F.
        neuron_bytes: Of one neuron in a record.
        record_bytes: Of a record, and from one piece to the next.
        chunk_neurons: A piece ends at a multiple of it, or is whole, with its tail.
        landing_address: Of the first piece.
        expert_N: int32, of whom the pieces are; written, as all that follow.
        neurons_N: int32, leading neurons that land; 0 beyond the last piece.
        source_N: int64, copies.
        target_N: int64.
        num_bytes_N: int64.
        counters_X: int64.
    """
    num_pieces = len(expert_N)
    e_block, columns, num_warps = blocks(len(next_E))
    _land[(1,)](
        next_E,
        least_1,
        allowance_1,
        left_1,
        resident_E.view(torch.int8),
        home_E,
        len(next_E),
        num_neurons,
        neuron_bytes,
        record_bytes,
        landing_address,
        expert_N,
        neurons_N,
        source_N,
        target_N,
        num_bytes_N,
        num_pieces,
        counters_X,
        E_BLOCK=e_block,
        N_BLOCK=triton.next_power_of_2(num_pieces),
        COLUMNS=columns,
        CHUNK=chunk_neurons,
        num_warps=num_warps,
    )


def claim(
    *,
    expert_N: Tensor,
    neurons_N: Tensor,
    landed_bytes_N: Tensor,
    active: Active,
    target_N: Tensor,
    num_bytes_N: Tensor,
    counters_X: Tensor,
) -> None:
    """Say what goes into the slots of newcomers, and that it is present there.

    Args:
        expert_N: From `land`, as the next two.
        neurons_N: Likewise.
        landed_bytes_N: Likewise, its ``num_bytes_N``.
        active: Of the event; ``present_A`` is written.
        target_N: int64, the newcomers' slots; written.
        num_bytes_N: int64, 0 for what nobody needs; written.
        counters_X: int64.
    """
    num_pieces, num_entries = len(expert_N), len(active.expert_A)
    _claim[(1,)](
        expert_N,
        neurons_N,
        landed_bytes_N,
        num_pieces,
        active.num_1,
        active.expert_A,
        active.slot_address_A,
        active.present_A,
        num_entries,
        target_N,
        num_bytes_N,
        counters_X,
        N_BLOCK=triton.next_power_of_2(num_pieces),
        A_BLOCK=triton.next_power_of_2(num_entries),
        num_warps=4,
    )
