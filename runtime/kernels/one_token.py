"""One token's experts: every program streams whole neurons, which lie one after the other.

With one token there is one product per weight, so that memory decides. A step of a program reads a
few neurons with all their rows in one contiguous piece, and the next step's are on their way
meanwhile; what they add to the output stays in registers until the program's chunk is done. Several
tokens share each weight and go through tensor cores instead (`runtime.kernels.experts`).

Shape letters: K experts per token · E experts · D hidden · F expert FFN inner size · R rows per
neuron · A active experts · C chunks of neurons.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from runtime.kernels.gates import activate
from runtime.kernels.lane import end_of_neurons
from runtime.kernels.places import address_of


@triton.jit
def _neurons(base, f, d, inside, D, ROW: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr):
    """Row ``ROW`` of neurons ``f``."""
    at = base + (f.to(tl.int64) * (R * D) + ROW * D)[:, None] + d[None, :]
    if ALIGNED:  # wide loads need to be told
        at = tl.max_contiguous(tl.multiple_of(at, (1, 16)), (1, d.shape[0]))
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _keep(target, f, d, inside, D, rows, ROW: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr):
    at = target + (f.to(tl.int64) * (R * D) + ROW * D)[:, None] + d[None, :]
    if ALIGNED:
        at = tl.max_contiguous(tl.multiple_of(at, (1, 16)), (1, d.shape[0]))
    tl.store(at, rows, mask=inside)


@triton.jit
def one_token_chunks(
    hidden_D,
    ids_K,
    num_active_1,
    expert_A,
    slot_A,
    present_A,
    home_E,
    split_E,
    failed_1,
    landed_E,
    until_E,
    times_AC2,
    partial_KCD,
    D,
    F,
    slot_neurons,
    num_chunks,
    ALPHA,
    LIMIT,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEURONS: tl.constexpr,
    LANDED: tl.constexpr,
    TIMED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """What one chunk of ``CHUNK`` neurons of one active expert adds to the output.

    ``STEP`` neurons at a time; it divides ``CHUNK`` and 64, so that a step lies in one place.
    """
    a = tl.program_id(1)
    chunk = tl.program_id(0)
    expert = tl.load(expert_A + a)
    stop = end_of_neurons(split_E, failed_1, expert, chunk * CHUNK + CHUNK, F, NEURONS)
    if (a < tl.load(num_active_1)) & (chunk * CHUNK < stop):
        if TIMED:
            tl.store(times_AC2 + (a * num_chunks + chunk) * 2, globaltimer())
        slot = tl.load(slot_A + a)
        present = tl.load(present_A + a)
        home = tl.load(home_E + expert)
        rest = home
        until = 0
        if LANDED:
            rest = tl.load(landed_E + expert)
            until = tl.load(until_E + expert)
        has_slot = slot != 0
        k = tl.arange(0, K_BLOCK)
        ids = tl.load(ids_K + k, mask=k < K, other=-1)
        entry = tl.sum(tl.where(ids == expert, k, 0), 0)
        d = tl.arange(0, D_BLOCK)
        d_inside = d < D
        x = tl.load(hidden_D + d, mask=d_inside, other=0.0).to(DTYPE).to(tl.float32)[None, :]
        biases = tl.where(has_slot & (present == F), slot, home).to(tl.pointer_type(DTYPE))
        tail = F.to(tl.int64) * (R * D)  # what stands behind the block of weights

        first = chunk * CHUNK
        f = first + tl.arange(0, STEP)
        inside = (f < stop)[:, None] & d_inside[None, :]
        base = address_of(first, slot, present, rest, until, home).to(tl.pointer_type(DTYPE))
        w_gate = _neurons(base, f, d, inside, D, 0, R, ALIGNED)
        w_up = _neurons(base, f, d, inside, D, R - 2, R, ALIGNED)
        w_down = _neurons(base, f, d, inside, D, R - 1, R, ALIGNED)
        total = tl.zeros([D_BLOCK], tl.float32)
        for start in range(first, first + CHUNK, STEP):
            # The next step's weights, before this one's are waited for.
            after = start + STEP
            f_next = after + tl.arange(0, STEP)
            left = (f_next < stop) & (after < first + CHUNK)
            inside_next = left[:, None] & d_inside[None, :]
            base = address_of(after, slot, present, rest, until, home).to(tl.pointer_type(DTYPE))
            gate_next = _neurons(base, f_next, d, inside_next, D, 0, R, ALIGNED)
            up_next = _neurons(base, f_next, d, inside_next, D, R - 2, R, ALIGNED)
            down_next = _neurons(base, f_next, d, inside_next, D, R - 1, R, ALIGNED)

            if WRITE:
                if has_slot & (start >= present) & (start < slot_neurons):
                    target = slot.to(tl.pointer_type(DTYPE))
                    if R == 3:
                        _keep(target, f, d, inside, D, w_gate, 0, R, ALIGNED)
                    _keep(target, f, d, inside, D, w_up, R - 2, R, ALIGNED)
                    _keep(target, f, d, inside, D, w_down, R - 1, R, ALIGNED)
            up = tl.sum(w_up.to(tl.float32) * x, 1)
            gate = tl.sum(w_gate.to(tl.float32) * x, 1) if R == 3 else up
            if HAS_BIAS:
                bias_at = biases + tail + f * (R - 1)
                up += tl.load(bias_at + (R - 2), mask=f < F, other=0.0).to(tl.float32)
                gate += tl.load(bias_at, mask=f < F, other=0.0).to(tl.float32)
            inner = activate(gate, up, KIND, R == 3, ALPHA, LIMIT)
            rounded = inner.to(DTYPE).to(tl.float32)
            total += tl.sum(w_down.to(tl.float32) * rounded[:, None], 0)
            w_gate = gate_next
            w_up = up_next
            w_down = down_next
            f = f_next
            inside = inside_next
        out = (entry.to(tl.int64) * num_chunks + chunk) * D + d
        tl.store(partial_KCD + out, total, mask=d_inside)

        if WRITE:
            if HAS_BIAS:
                # The tail goes with the last chunk, where a slot has room for all of the expert.
                last = (chunk == num_chunks - 1) & (slot_neurons == F)
                if has_slot & (present < F) & last:
                    source = home.to(tl.pointer_type(DTYPE)) + tail
                    target = slot.to(tl.pointer_type(DTYPE)) + tail
                    size = F * (R - 1) + D
                    for start in range(0, size, 1024):
                        at = start + tl.arange(0, 1024)
                        value = tl.load(source + at, mask=at < size)
                        tl.store(target + at, value, mask=at < size)
        if TIMED:
            tl.debug_barrier()  # until its last warp is done
            tl.store(times_AC2 + (a * num_chunks + chunk) * 2 + 1, globaltimer())
