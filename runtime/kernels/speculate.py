"""What is fetched beside the slots for the next layer: bottoms of cached tops, or whole experts.

Two launches a layer, each of one program, so no atomics: `choose` before the layer's router has
spoken, `settle` afterwards. What the first writes down, `runtime.kernels.copy` copies.

Shape letters: E experts per layer · N pieces · X counters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.device_cache import COUNTERS, Landed
from runtime.kernels.pairs import blocks, order_key, sum_below

_PREFETCHED = tl.constexpr(COUNTERS.index("prefetched"))
_PREFETCHED_NEURONS = tl.constexpr(COUNTERS.index("prefetched_neurons"))
_WASTED = tl.constexpr(COUNTERS.index("wasted"))
_WASTED_NEURONS = tl.constexpr(COUNTERS.index("wasted_neurons"))
_USED_NEURONS = tl.constexpr(COUNTERS.index("used_neurons"))
_MISSED_NEURONS = tl.constexpr(COUNTERS.index("missed_neurons"))


@triton.jit
def _count(counters_X, PLACE: tl.constexpr, amount):
    tl.store(counters_X + PLACE, tl.load(counters_X + PLACE) + amount)


@triton.jit
def _choose(
    next_E,
    present_E,
    home_E,
    num_experts,
    num_neurons,
    neuron_bytes,
    record_bytes,
    allowance,
    num_pieces,
    buffer,
    landed_E,
    until_E,
    portion_E,
    source_N,
    target_N,
    num_bytes_N,
    counters_X,
    E_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    e = tl.arange(0, E_BLOCK)
    inside = e < num_experts
    score = tl.load(next_E + e, mask=inside, other=0.0)
    present = tl.load(present_E + e, mask=inside, other=num_neurons)
    home = tl.load(home_E + e, mask=inside, other=0)
    wanted = (inside & (score > 0) & (present < num_neurons)).to(tl.int32)
    missing = (num_neurons - present) * wanted
    key = order_key(-score, e, wanted)
    place = sum_below(key, wanted, COLUMNS)
    left = tl.maximum(allowance - sum_below(key, missing, COLUMNS), 0)
    portion = tl.where(missing <= left, missing, left // CHUNK * CHUNK)
    portion = tl.where((wanted == 1) & (place < num_pieces), portion, 0)
    comes = portion > 0
    is_whole = present + portion == num_neurons  # then the biases behind its neurons come, too
    tail_bytes = tl.where(is_whole, record_bytes - num_neurons * neuron_bytes, 0)
    start_bytes = present.to(tl.int64) * neuron_bytes
    landed = buffer + place.to(tl.int64) * record_bytes
    tl.store(landed_E + e, landed, mask=inside)
    tl.store(until_E + e, tl.where(comes, present + portion, 0), mask=inside)
    tl.store(portion_E + e, portion, mask=inside)
    tl.store(source_N + place, home + start_bytes, mask=comes)
    tl.store(target_N + place, landed + start_bytes, mask=comes)
    tl.store(num_bytes_N + place, portion.to(tl.int64) * neuron_bytes + tail_bytes, mask=comes)
    n = tl.arange(0, N_BLOCK)
    num_comes = tl.sum(comes.to(tl.int32), 0)
    nothing = (n >= num_comes) & (n < num_pieces)
    tl.store(num_bytes_N + n, tl.zeros([N_BLOCK], tl.int64), mask=nothing)
    _count(counters_X, _PREFETCHED, num_comes)
    _count(counters_X, _PREFETCHED_NEURONS, tl.sum(portion, 0))


@triton.jit
def _settle(portion_E, needed_E, num_experts, counters_X, E_BLOCK: tl.constexpr):
    e = tl.arange(0, E_BLOCK)
    portion = tl.load(portion_E + e, mask=e < num_experts, other=0)
    needed = tl.load(needed_E + e, mask=e < num_experts, other=0).to(tl.int32)
    used = tl.sum(portion * needed, 0)
    _count(counters_X, _USED_NEURONS, used)
    _count(counters_X, _MISSED_NEURONS, -used)
    _count(counters_X, _WASTED, tl.sum((portion > 0).to(tl.int32) * (1 - needed), 0))
    _count(counters_X, _WASTED_NEURONS, tl.sum(portion * (1 - needed), 0))


def choose(
    *,
    next_E: Tensor,
    present_E: Tensor,
    home_E: Tensor,
    num_neurons: int,
    neuron_bytes: int,
    record_bytes: int,
    chunk_neurons: int,
    allowance: int,
    buffer_address: int,
    landed: Landed,
    portion_E: Tensor,
    source_N: Tensor,
    target_N: Tensor,
    num_bytes_N: Tensor,
    counters_X: Tensor,
) -> None:
    """Choose what comes of the likeliest experts, in their order, as far as the allowance goes.

    Args:
        next_E: float32; the higher, the sooner. What has 0 or less does not come.
        present_E: int32, neurons that lie in each expert's slot; the rest is missing.
        home_E: int64, addresses of the records.
        num_neurons: F.
        neuron_bytes: Of one neuron in a record.
        record_bytes: Of a record, and from one piece to the next.
        chunk_neurons: A piece that the allowance cuts ends at a multiple of it.
        allowance: Neurons of all pieces together.
        buffer_address: Of the first piece's record; the others follow.
        landed: Written, as all that follow.
        portion_E: int32, neurons that come of each expert.
        source_N: int64, copies.
        target_N: int64.
        num_bytes_N: int64; 0 beyond the last piece.
        counters_X: int64.
    """
    num_pieces = len(num_bytes_N)
    e_block, columns, num_warps = blocks(len(next_E))
    _choose[(1,)](
        next_E,
        present_E,
        home_E,
        len(next_E),
        num_neurons,
        neuron_bytes,
        record_bytes,
        allowance,
        num_pieces,
        buffer_address,
        landed.address_E,
        landed.until_E,
        portion_E,
        source_N,
        target_N,
        num_bytes_N,
        counters_X,
        E_BLOCK=e_block,
        N_BLOCK=triton.next_power_of_2(num_pieces),
        COLUMNS=columns,
        CHUNK=chunk_neurons,
        num_warps=num_warps,
    )


def settle(*, portion_E: Tensor, needed_E: Tensor, counters_X: Tensor) -> None:
    """The layer's event is known: count what came for it, and what came for nothing.

    Args:
        portion_E: int32, from `choose`.
        needed_E: bool, what the event needs.
        counters_X: int64.
    """
    _settle[(1,)](
        portion_E,
        needed_E.view(torch.int8),
        len(portion_E),
        counters_X,
        E_BLOCK=triton.next_power_of_2(len(portion_E)),
        num_warps=4,
    )
