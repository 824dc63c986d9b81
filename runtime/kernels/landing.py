"""Prefetches that displace nothing: which experts land beside the slots, and which came true.

Two launches a layer: `land`, of one program, decides once the layer's event is known what comes for
the layers behind it; `claim` gives a layer's newcomers what has landed, and copies it into their
slots. Counters are integers, so that it does not matter in which order programs add to them.

Shape letters: E experts per layer · H layers ahead · M = H * E candidates · N pieces · A entries of
an active list · L MoE layers · X counters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.device_cache import COUNTERS, Active
from runtime.kernels.copy import BLOCK, copy_range

_PREFETCHED = tl.constexpr(COUNTERS.index("prefetched"))
_PREFETCHED_NEURONS = tl.constexpr(COUNTERS.index("prefetched_neurons"))
_WASTED = tl.constexpr(COUNTERS.index("wasted"))
_WASTED_NEURONS = tl.constexpr(COUNTERS.index("wasted_neurons"))
_USED_NEURONS = tl.constexpr(COUNTERS.index("used_neurons"))
_MISSED_NEURONS = tl.constexpr(COUNTERS.index("missed_neurons"))
MAX_CANDIDATES = 512
"""One program looks through all of them, in the registers that are left beside the experts."""


@triton.jit
def _land(
    next_M,
    least_H,
    resident_M,
    home_M,
    num_candidates,
    num_experts,
    first_layer,
    allowance_2,
    left_1,
    waits_1,
    num_active_1,
    active_present_A,
    num_entries,
    num_neurons,
    neuron_bytes,
    record_bytes,
    landing,
    layer_N,
    expert_N,
    neurons_N,
    source_N,
    target_N,
    num_bytes_N,
    rest_bytes_N,
    num_pieces,
    counters_LX,
    num_counters,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_FIRST: tl.constexpr,
    HAS_EVENT: tl.constexpr,
):
    m = tl.arange(0, M_BLOCK)
    inside = m < num_candidates
    probability = tl.load(next_M + m, mask=inside, other=0.0)
    least = tl.load(least_H + m // num_experts, mask=inside, other=float("inf"))
    resident = tl.load(resident_M + m, mask=inside, other=1)
    wanted = inside & (probability >= least) & (probability > 0) & (resident == 0)

    # What the event misses is on the link: then copies wait for it, and have less time.
    waits = 0
    has_experts_time = 0
    if HAS_EVENT:
        a = tl.arange(0, A_BLOCK)
        active = (a < tl.load(num_active_1)) & (a < num_entries)
        present = tl.load(active_present_A + a, mask=active, other=num_neurons)
        waits = tl.max((present < num_neurons).to(tl.int32), 0)
        has_experts_time = 1 - waits
    allowance = tl.load(allowance_2 + has_experts_time)

    # Pieces are for layers to come; what is of others has been claimed, or was for nothing.
    n = tl.arange(0, N_BLOCK)
    is_piece = n < num_pieces
    layer = tl.load(layer_N + n, mask=is_piece, other=-1)
    expert = tl.load(expert_N + n, mask=is_piece, other=0)
    landed = tl.load(neurons_N + n, mask=is_piece, other=0)
    held = is_piece & (landed > 0) & (layer >= first_layer)
    if IS_FIRST:  # of a pass: whatever lies there is an earlier one's
        held = held & (n < 0)
    landed = tl.where(held, landed, 0)
    candidate = tl.where(held, (layer - first_layer) * num_experts + expert, -1)
    likely = tl.load(next_M + candidate, mask=held, other=0.0)
    sure = likely >= tl.load(least_H + candidate // num_experts, mask=held, other=float("inf"))
    goes_on = held & sure & (likely > 0)

    # The likeliest take their turn: what has landed in part goes on, others need a free piece.
    left = allowance
    comes = tl.zeros([N_BLOCK], tl.int32)
    for _ in range(num_pieces):
        free = tl.min(tl.where(is_piece & (candidate < 0), n, N_BLOCK), 0)
        if free < N_BLOCK:
            best = tl.max(tl.where(wanted, probability, 0.0), 0)
            at = tl.min(tl.where(wanted & (probability == best), m, M_BLOCK), 0)
        else:
            best = tl.max(tl.where(goes_on, likely, 0.0), 0)
            at = tl.min(tl.where(goes_on & (likely == best), candidate, M_BLOCK), 0)
        its = candidate == at
        place = tl.min(tl.where(its, n, N_BLOCK), 0)
        place = tl.where(place < N_BLOCK, place, free)
        missing = num_neurons - tl.sum(tl.where(its, landed, 0), 0)
        portion = tl.where(missing <= left, missing, left // CHUNK * CHUNK)
        portion = tl.where(at < M_BLOCK, portion, 0)
        left -= portion
        chosen = (n == place) & (portion > 0)
        candidate = tl.where(chosen, at, candidate)
        comes = tl.where(chosen, portion, comes)
        wanted = wanted & (m != at)
        goes_on = goes_on & (candidate != at)

    taken = candidate >= 0
    row = first_layer + candidate // num_experts
    tl.store(layer_N + n, tl.where(taken, row, -1), mask=is_piece)
    tl.store(expert_N + n, tl.where(taken, candidate % num_experts, 0), mask=is_piece)
    tl.store(neurons_N + n, landed + comes, mask=is_piece)
    home = tl.load(home_M + candidate, mask=comes > 0, other=0)
    start_bytes = landed.to(tl.int64) * neuron_bytes
    is_whole = landed + comes == num_neurons  # then the biases behind its neurons come, too
    tail_bytes = tl.where(is_whole, record_bytes - num_neurons * neuron_bytes, 0)
    num_bytes = tl.where(comes > 0, comes.to(tl.int64) * neuron_bytes + tail_bytes, 0)
    tl.store(source_N + n, home + start_bytes, mask=is_piece)
    tl.store(target_N + n, landing + n.to(tl.int64) * record_bytes + start_bytes, mask=is_piece)
    tl.store(num_bytes_N + n, num_bytes * (1 - waits), mask=is_piece)
    tl.store(rest_bytes_N + n, num_bytes * waits, mask=is_piece)
    tl.store(left_1, allowance - tl.sum(comes, 0))
    tl.store(waits_1, waits)
    counters = counters_LX + row.to(tl.int64) * num_counters
    is_new = ((landed == 0) & (comes > 0)).to(tl.int64)
    tl.atomic_add(counters + _PREFETCHED, is_new, mask=comes > 0)
    tl.atomic_add(counters + _PREFETCHED_NEURONS, comes.to(tl.int64), mask=comes > 0)


@triton.jit
def _claim(
    event_layer,
    layer_N,
    expert_N,
    neurons_N,
    landing,
    num_neurons,
    neuron_bytes,
    record_bytes,
    num_active_1,
    active_expert_A,
    active_slot_A,
    active_present_A,
    num_entries,
    counters_X,
    A_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(1)
    neurons = tl.load(neurons_N + piece)
    if (tl.load(layer_N + piece) == event_layer) & (neurons > 0):
        a = tl.arange(0, A_BLOCK)
        active = (a < tl.load(num_active_1)) & (a < num_entries)
        needed = tl.load(active_expert_A + a, mask=active, other=-1)
        slot = tl.load(active_slot_A + a, mask=active, other=0)
        # A piece serves a newcomer; what got no room is read in place, since nothing keeps it.
        serves = (needed == tl.load(expert_N + piece)) & (slot != 0) & active
        target = tl.sum(tl.where(serves, slot, 0), 0)
        came_true = target != 0
        num_bytes = neurons.to(tl.int64) * neuron_bytes
        if neurons == num_neurons:
            num_bytes = record_bytes.to(tl.int64)
        if came_true:
            copy_range(landing + piece.to(tl.int64) * record_bytes, target, num_bytes, BLOCK)
        if tl.program_id(0) == 0:
            tl.store(active_present_A + a, tl.zeros_like(needed) + neurons, mask=serves)
            used = tl.where(came_true, neurons, 0).to(tl.int64)
            tl.atomic_add(counters_X + _MISSED_NEURONS, -used)
            tl.atomic_add(counters_X + _USED_NEURONS, used)
            tl.atomic_add(counters_X + _WASTED, 1 - came_true.to(tl.int64))
            tl.atomic_add(counters_X + _WASTED_NEURONS, neurons - used)


def land(
    *,
    next_HE: Tensor,
    least_H: Tensor,
    resident_HE: Tensor,
    home_HE: Tensor,
    first_layer: int,
    is_first: bool,
    active: Active | None,
    allowance_2: Tensor,
    left_1: Tensor,
    waits_1: Tensor,
    num_neurons: int,
    neuron_bytes: int,
    record_bytes: int,
    chunk_neurons: int,
    landing_address: int,
    layer_N: Tensor,
    expert_N: Tensor,
    neurons_N: Tensor,
    source_N: Tensor,
    target_N: Tensor,
    num_bytes_N: Tensor,
    rest_bytes_N: Tensor,
    counters_LX: Tensor,
) -> None:
    """Decide what lands next, the likeliest first, and of what is there already the rest first.

    Args:
        next_HE: float32, contiguous, probabilities of use in the layers to come; at most
            `MAX_CANDIDATES`.
        least_H: float32, none below its layer's is chosen.
        resident_HE: bool, rows of all layers' books, as the next.
        home_HE: int64, addresses of the records.
        first_layer: Of those layers.
        is_first: No piece is held: the pass begins.
        active: The event that is to compute now; None where a pass begins.
        allowance_2: int32, neurons of all pieces together: where the event misses something, or a
            pass begins, and where the event misses nothing.
        left_1: int32, what is left of them; written.
        waits_1: int32, whether the event misses something; written.
        num_neurons: F.
        neuron_bytes: Of one neuron in a record.
        record_bytes: Of a record, and from one piece to the next.
        chunk_neurons: A piece ends at a multiple of it, or is whole, with its tail.
        landing_address: Of the first piece.
        layer_N: int32, whose the pieces are, -1 = nobody's; written, as all that follow.
        expert_N: int32.
        neurons_N: int32, leading neurons that have landed, or will by these copies.
        source_N: int64, copies.
        target_N: int64.
        num_bytes_N: int64, of what may be copied at once.
        rest_bytes_N: int64, of what waits until the event's experts have computed.
        counters_LX: int64, contiguous, of all layers.
    """
    num_layers, num_experts = next_HE.shape
    num_candidates, num_pieces = num_layers * num_experts, len(expert_N)
    present_A = neurons_N if active is None else active.present_A
    _land[(1,)](
        next_HE,
        least_H,
        resident_HE.view(torch.int8),
        home_HE,
        num_candidates,
        num_experts,
        first_layer,
        allowance_2,
        left_1,
        waits_1,
        neurons_N if active is None else active.num_1,
        present_A,
        len(present_A),
        num_neurons,
        neuron_bytes,
        record_bytes,
        landing_address,
        layer_N,
        expert_N,
        neurons_N,
        source_N,
        target_N,
        num_bytes_N,
        rest_bytes_N,
        num_pieces,
        counters_LX,
        counters_LX.shape[1],
        M_BLOCK=triton.next_power_of_2(num_candidates),
        N_BLOCK=triton.next_power_of_2(num_pieces),
        A_BLOCK=triton.next_power_of_2(len(present_A)),
        CHUNK=chunk_neurons,
        IS_FIRST=is_first,
        HAS_EVENT=active is not None,
        num_warps=2,  # it runs beside the experts, which leave few registers
    )


def claim(
    *,
    layer: int,
    layer_N: Tensor,
    expert_N: Tensor,
    neurons_N: Tensor,
    landing_address: int,
    num_neurons: int,
    neuron_bytes: int,
    record_bytes: int,
    active: Active,
    counters_X: Tensor,
    programs_per_record: int,
) -> None:
    """Give a layer's newcomers what has landed for them: copied, present, and counted.

    Args:
        layer: Whose event it is.
        layer_N: From `land`, as the next two.
        expert_N: Likewise.
        neurons_N: Likewise.
        landing_address: As `land` has it, and the next three.
        num_neurons: F.
        neuron_bytes: Of one neuron.
        record_bytes: Of a record.
        active: Of the event; ``present_A`` is written.
        counters_X: int64, the layer's.
        programs_per_record: Of the copy.
    """
    num_entries = len(active.expert_A)
    _claim[(programs_per_record, len(expert_N))](
        layer,
        layer_N,
        expert_N,
        neurons_N,
        landing_address,
        num_neurons,
        neuron_bytes,
        record_bytes,
        active.num_1,
        active.expert_A,
        active.slot_address_A,
        active.present_A,
        num_entries,
        counters_X,
        A_BLOCK=triton.next_power_of_2(num_entries),
        BLOCK=BLOCK,
        num_warps=8,
    )
