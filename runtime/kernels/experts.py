"""The routed part of a MoE layer for a few tokens: every needed expert is read once, where it lies.

Experts are records (`runtime.expert_layout`): neuron-major, so that one pass over a range of
neurons computes gate, up, activation and down. A program does that for one expert and one chunk of
neurons, and writes what they add to the output; a second kernel sums those in a fixed order. No
atomics: the same inputs give the same bits, wherever each expert lies.

A chunk is read from the expert's slot as far as the slot has it, then from where a prefetch has
landed (`Landed`) as far as that goes, else at home. With *write-through*
what was read at home is put into the slot in passing, so that a miss crosses the link once and
computes meanwhile. Misses come first in the active list, and so do their programs.

The host may compute the last neurons of some experts meanwhile (`runtime.kernels.lane`): then they
are left out here, unless its answer fails to come, and its sums are added to the others.

Shape letters: T tokens · K experts per token · E experts · D hidden · F expert FFN inner size ·
R rows per neuron · A active experts · N = T * K uses · C chunks of neurons.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from runtime.device_cache import Active, Landed
from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import KINDS, Activation
from runtime.kernels.gates import activate
from runtime.kernels.lane import ALL, LEFT_OUT, OURS, LaneEvent, await_answer, end_of_neurons
from runtime.kernels.one_token import one_token_chunks
from runtime.kernels.places import address_of
from runtime.kernels.sums import reduce_partials
from runtime.kernels.tiles import (
    DEFAULT_TILES,
    MAX_TOKENS,
    Stream,
    Tiles,
    stream_for,
    workspace_elements,
)

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_REDUCED_CHUNKS, _REDUCED_COLUMNS = 128, 16  # of one tile of the second kernel


@triton.jit
def _at(base, row, d, ALIGNED: tl.constexpr):
    """Addresses of numbers ``d`` of rows; wide loads need to be told that they are aligned."""
    at = base + (row[:, None] + d[None, :])
    if ALIGNED:
        at = tl.max_contiguous(tl.multiple_of(at, (1, 16)), (1, d.shape[0]))
    return at


@triton.jit
def _chunks(
    hidden_TD,
    ids_TK,
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
    partial_NCD,
    num_tokens,
    D,
    F,
    slot_neurons,
    num_chunks,
    ALPHA,
    LIMIT,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEURONS: tl.constexpr,
    LANDED: tl.constexpr,
    TIMED: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
):
    a = tl.program_id(1)
    chunk = tl.program_id(0)
    expert = tl.load(expert_A + a)
    stop = end_of_neurons(split_E, failed_1, expert, chunk * BF + BF, F, NEURONS)
    if (a < tl.load(num_active_1)) & (chunk * BF < stop):
        if TIMED:
            tl.store(times_AC2 + (a * num_chunks + chunk) * 2, globaltimer())
        slot = tl.load(slot_A + a)
        present = tl.load(present_A + a)
        home = tl.load(home_E + expert)
        first = chunk * BF
        rest = home
        until = 0
        if LANDED:
            rest = tl.load(landed_E + expert)
            until = tl.load(until_E + expert)
        base = address_of(first, slot, present, rest, until, home).to(tl.pointer_type(DTYPE))
        target = slot.to(tl.pointer_type(DTYPE))
        into_slot = (slot != 0) & (first >= present) & (first < slot_neurons)
        f = first + tl.arange(0, BF)
        f_inside = f < stop
        row = f.to(tl.int64) * (R * D)

        # Which of the tokens use this expert, and as which of their K.
        k = tl.arange(0, K_BLOCK)
        t = tl.arange(0, T_BLOCK)
        place = t[:, None] * K + k[None, :]
        valid = (t[:, None] < num_tokens) & (k[None, :] < K)
        ids = tl.load(ids_TK + place, mask=valid, other=-1)
        mine = (ids == expert) & valid
        uses = tl.max(mine.to(tl.int32), 1)
        entry = tl.sum(tl.where(mine, place, 0), 1)

        gate_sum = tl.zeros([T_BLOCK, BF], tl.float32)
        up_sum = tl.zeros([T_BLOCK, BF], tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = f_inside[:, None] & (d[None, :] < D)
            x_inside = (t[:, None] < num_tokens) & (d[None, :] < D)
            x = tl.load(hidden_TD + t[:, None] * D + d[None, :], mask=x_inside, other=0.0)
            x = x.to(DTYPE).to(DOT_DTYPE)
            w_up = tl.load(_at(base + (R - 2) * D, row, d, ALIGNED), mask=inside, other=0.0)
            up_sum = tl.dot(x, tl.trans(w_up).to(DOT_DTYPE), up_sum, input_precision="ieee")
            if R == 3:
                w_gate = tl.load(_at(base, row, d, ALIGNED), mask=inside, other=0.0)
                gate_sum = tl.dot(
                    x, tl.trans(w_gate).to(DOT_DTYPE), gate_sum, input_precision="ieee"
                )
            if WRITE:
                if into_slot:
                    tl.store(_at(target + (R - 2) * D, row, d, ALIGNED), w_up, mask=inside)
                    if R == 3:
                        tl.store(_at(target, row, d, ALIGNED), w_gate, mask=inside)
        gate = gate_sum
        up = up_sum
        tail = F.to(tl.int64) * (R * D)  # what stands behind the block of weights
        if HAS_BIAS:
            whole = (slot != 0) & (present == F)
            biases = tl.where(whole, slot, home).to(tl.pointer_type(DTYPE)) + tail
            up_at = biases + f * (R - 1) + (R - 2)
            up_bias = tl.load(up_at, mask=f_inside, other=0.0).to(tl.float32)
            gate_bias = tl.load(biases + f * (R - 1), mask=f_inside, other=0.0).to(tl.float32)
            up += up_bias[None, :]
            gate += gate_bias[None, :]
        inner = activate(gate, up, KIND, R == 3, ALPHA, LIMIT)

        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = f_inside[:, None] & (d[None, :] < D)
            w_down = tl.load(_at(base + (R - 1) * D, row, d, ALIGNED), mask=inside, other=0.0)
            if WRITE:
                if into_slot:
                    tl.store(_at(target + (R - 1) * D, row, d, ALIGNED), w_down, mask=inside)
            rounded = inner.to(DTYPE).to(DOT_DTYPE)
            added = tl.dot(rounded, w_down.to(DOT_DTYPE), input_precision="ieee")
            out = (entry[:, None].to(tl.int64) * num_chunks + chunk) * D + d[None, :]
            tl.store(partial_NCD + out, added, mask=(uses[:, None] == 1) & (d[None, :] < D))

        if WRITE:
            if HAS_BIAS:
                # The tail goes with the last chunk that the slot has room for.
                if into_slot & (slot_neurons == F) & (chunk == num_chunks - 1):
                    source = home.to(tl.pointer_type(DTYPE)) + tail
                    size = F * (R - 1) + D
                    for start in range(0, size, 1024):
                        at = start + tl.arange(0, 1024)
                        value = tl.load(source + at, mask=at < size)
                        tl.store(target + tail + at, value, mask=at < size)
        if TIMED:
            tl.debug_barrier()  # until its last warp is done
            tl.store(times_AC2 + (a * num_chunks + chunk) * 2 + 1, globaltimer())


def expert_step(
    *,
    hidden_TD: Tensor,
    topk_expert_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    active: Active,
    home_address_E: Tensor,
    address_E: Tensor,
    slot_neurons: int,
    layout: ExpertLayout,
    activation: Activation,
    workspace: Tensor,
    output_TD: Tensor,
    write_through: bool = True,
    tiles: Tiles = DEFAULT_TILES,
    stream: Stream | None = None,
    lane: LaneEvent | None = None,
    landed: Landed | None = None,
    times_AC2: Tensor | None = None,
) -> None:
    """Compute a layer's routed experts for T tokens, the weighted sum of each token's.

    Products are of the weights' dtype and summed in float32; what is between the projections is
    rounded once, to the weights' dtype, where transformers rounds after every operation.

    Args:
        hidden_TD: Contiguous, T from 1 to `MAX_TOKENS`.
        topk_expert_ids_TK: int64, contiguous; ids of E and above are skipped.
        topk_weights_TK: Contiguous.
        active: The event's experts (`runtime.device_cache.DeviceCache.step`).
        home_address_E: int64, every expert's record.
        address_E: int64, where the down biases are read: a whole record.
        slot_neurons: How many neurons a slot holds; the rest of an expert is always read at home.
        layout: Of the records.
        activation: Of the experts.
        workspace: float32, at least `workspace_elements`.
        output_TD: Contiguous; every element is written.
        write_through: Put what is read at home into the slots that experts have.
        tiles: How the work is cut for several tokens.
        stream: For one; None takes `stream_for` the layout.
        lane: Leave to the host what `runtime.kernels.lane.post_request` has asked it for.
        landed: What lies beside the slots, of the experts of this layer.
        times_AC2: int64, when each chunk of each active expert was begun and done, nanoseconds of
            the device's clock; written where given, only on a GPU.

    Raises:
        ValueError: Too many tokens, a tensor that is not contiguous, or too small a workspace.
    """
    (T, D), K = hidden_TD.shape, topk_expert_ids_TK.shape[1]
    stream = stream or stream_for(layout)
    if not 1 <= T <= MAX_TOKENS:
        raise ValueError(f"{T} tokens: must be in 1..{MAX_TOKENS}")
    if not all(
        x.is_contiguous() for x in (hidden_TD, topk_expert_ids_TK, topk_weights_TK, output_TD)
    ):
        raise ValueError("hidden states, expert ids, weights and output must be contiguous")
    elements = workspace_elements(num_tokens=T, top_k=K, layout=layout, tiles=tiles, stream=stream)
    if workspace.numel() < elements:
        raise ValueError(f"workspace of {workspace.numel()} elements: {elements} are needed")
    F, R = layout.expert_intermediate_size, layout.num_rows
    chunk_neurons = (stream if T == 1 else tiles).neurons
    num_chunks = math.ceil(F / chunk_neurons)
    dtype = _TRITON_DTYPES[layout.dtype]
    grid = (num_chunks, min(len(active.expert_A), T * K))  # no more can be active
    split_E = active.expert_A if lane is None else lane.books.split_LE[lane.layer]
    failed_1 = active.num_1 if lane is None else lane.books.failed_1
    operands = (
        hidden_TD,
        topk_expert_ids_TK,
        active.num_1,
        active.expert_A,
        active.slot_address_A,
        active.present_A,
        home_address_E,
        split_E,
        failed_1,
        home_address_E if landed is None else landed.address_E,
        active.expert_A if landed is None else landed.until_E,
        workspace if times_AC2 is None else times_AC2,
        workspace,
    )
    gate = (activation.alpha, activation.limit)
    constants = {
        "K": K,
        "K_BLOCK": triton.next_power_of_2(K),
        "R": R,
        "HAS_BIAS": layout.has_bias,
        "KIND": KINDS.index(activation.kind),
        "DTYPE": dtype,
        "ALIGNED": D * layout.dtype.itemsize % 16 == 0,
        "LANDED": landed is not None,
        "TIMED": times_AC2 is not None,
    }
    for neurons in (ALL,) if lane is None else (OURS, LEFT_OUT):
        if lane is not None and neurons == LEFT_OUT:
            await_answer(lane)
        if T == 1:
            one_token_chunks[grid](
                *operands,
                D,
                F,
                slot_neurons,
                num_chunks,
                *gate,
                **constants,
                WRITE=write_through and neurons != LEFT_OUT,
                NEURONS=neurons,
                CHUNK=stream.neurons,
                STEP=stream.step,
                D_BLOCK=triton.next_power_of_2(D),
                num_warps=stream.num_warps,
            )
        else:
            _chunks[grid](
                *operands,
                T,
                D,
                F,
                slot_neurons,
                num_chunks,
                *gate,
                **constants,
                WRITE=write_through and neurons != LEFT_OUT,
                NEURONS=neurons,
                T_BLOCK=16 if T <= 16 else 32,  # tensor cores take no fewer rows
                # The interpreter has no products of bfloat16; in float32 they are as exact.
                DOT_DTYPE=tl.float32 if triton.knobs.runtime.interpret else dtype,
                BF=tiles.neurons,
                BD=tiles.columns,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
    # A slot that holds a part only has no biases: they are read at home.
    is_whole = slot_neurons == F and write_through and lane is None
    reduce_partials[(triton.cdiv(D, _REDUCED_COLUMNS), T)](
        workspace,
        topk_expert_ids_TK,
        topk_weights_TK,
        address_E if is_whole else home_address_E,
        split_E,
        failed_1,
        workspace if lane is None else lane.mailbox.answer_ND,
        output_TD,
        home_address_E.shape[0],
        D,
        F,
        num_chunks,
        K=K,
        R=R,
        HAS_BIAS=layout.has_bias,
        DTYPE=dtype,
        LANE=lane is not None,
        BF=chunk_neurons,
        BC=_REDUCED_CHUNKS,
        BD=_REDUCED_COLUMNS,
        num_warps=4,
    )


def expert_step_reference(
    *,
    hidden_TD: Tensor,
    topk_expert_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    records_EP: Tensor,
    layout: ExpertLayout,
    activation: Activation,
) -> Tensor:
    """The same from plain records, in float64: what the kernels are compared with."""
    output_TD = torch.zeros_like(hidden_TD, dtype=torch.float64)
    for t, ids_K in enumerate(topk_expert_ids_TK.tolist()):
        for k, expert in enumerate(ids_K):
            if expert >= len(records_EP):
                continue
            block_FRD = layout.block_FRD(records_EP[expert]).double()
            rows = [block_FRD[:, row] @ hidden_TD[t].double() for row in range(layout.num_rows - 1)]
            if layout.has_bias:
                bias_FU = layout.up_bias_FU(records_EP[expert]).double()
                rows = [row_F + bias_FU[:, u] for u, row_F in enumerate(rows)]
            inner_F = activation(rows[0], rows[-1], layout.has_gate)
            out_D = inner_F @ block_FRD[:, -1]
            if layout.has_bias:
                out_D = out_D + layout.down_bias_D(records_EP[expert]).double()
            output_TD[t] += topk_weights_TK[t, k].double() * out_D
    return output_TD
