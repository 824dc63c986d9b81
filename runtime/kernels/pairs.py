"""Ranks, sums and slots of experts by comparing all pairs: what kernels do where torch would sort.

E is small, and E x E comparisons in parallel take less time than E steps in turn. They are made in
blocks of columns, so that however many experts there are, a thread holds few of them at once
(undivided, 512 experts spill 31 KB of registers a thread).

Functions that other kernels call; masks among their arguments are int32 of 0 and 1.

Shape letters: E experts per layer, as arranged by `blocks`.
"""

import triton
import triton.language as tl


def blocks(num_experts: int) -> tuple[int, int, int]:
    """E as a power of two, the columns of a block, and warps for 16 pairs a thread."""
    e_block = max(16, triton.next_power_of_2(num_experts))
    num_warps = 4 if e_block <= 64 else 8 if e_block <= 256 else 16
    return e_block, min(e_block, 16 * 32 * num_warps // e_block), num_warps


@triton.jit
def order_key(score_E, e, allowed_E):
    """Distinct int64 in the order of (score, id), `runtime.selection.lowest`'s; others behind."""
    bits = tl.where(score_E == 0, 0.0, score_E).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    return tl.where(allowed_E == 1, (ordered.to(tl.int64) << 20) + e, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _columns(values_E, block, COLUMNS: tl.constexpr):
    """One block of a vector."""
    return tl.gather(values_E, block * COLUMNS + tl.arange(0, COLUMNS), 0)


@triton.jit
def sum_below(key_E, weight_E, COLUMNS: tl.constexpr):
    """Of each expert, the int32 weights of all lower keys together; weights of 1 make it a rank."""
    total = tl.zeros([key_E.shape[0]], tl.int32)
    for block in range(key_E.shape[0] // COLUMNS):
        key, weight = _columns(key_E, block, COLUMNS), _columns(weight_E, block, COLUMNS)
        total += tl.sum(tl.where(key[None, :] < key_E[:, None], weight[None, :], 0), 1)
    return total


@triton.jit
def offered_at(place_E, offered_place_E, offered_E, COLUMNS: tl.constexpr):
    """What is offered at each expert's place (at most one offer a place); 0 where nothing is.

    Places and offers are int32; a place of an expert that takes none must meet no offer's.
    """
    taken = tl.zeros([place_E.shape[0]], offered_E.dtype)
    for block in range(place_E.shape[0] // COLUMNS):
        place = _columns(offered_place_E, block, COLUMNS)
        offered = _columns(offered_E, block, COLUMNS)
        taken += tl.sum(tl.where(place[None, :] == place_E[:, None], offered[None, :], 0), 1)
    return taken


@triton.jit
def hand_on_slots(slot_E, insert_E, evict_E, used, COLUMNS: tl.constexpr):
    """`runtime.selection.hand_on_slots`: newcomers take free slots, then the victims', by id."""
    num_evictions = tl.sum(evict_E, 0)
    num_free_taken = tl.sum(insert_E, 0) - num_evictions
    place = tl.cumsum(insert_E, 0) - 1
    inherited = tl.zeros([slot_E.shape[0]], tl.int32)
    if num_evictions > 0:
        freed = tl.where(evict_E == 1, tl.cumsum(evict_E, 0) - 1 + num_free_taken, -2)
        inherited = offered_at(place, freed, slot_E, COLUMNS)
    new_slot = tl.where(place < num_free_taken, used + place, inherited)
    return tl.where(insert_E == 1, new_slot, tl.where(evict_E == 1, -1, slot_E))
