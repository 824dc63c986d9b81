"""What experts' chunks have added, summed in a fixed order: weights, down biases, output dtype.

No atomics: the same inputs give the same bits, wherever each expert lies.

Shape letters: T tokens · K experts per token · D hidden · N = T * K uses · C chunks of neurons.
"""

import triton
import triton.language as tl


@triton.jit
def reduce_partials(
    partial_NCD,
    ids_TK,
    weights_TK,
    address_E,
    split_E,
    failed_1,
    answer_ND,
    output_TD,
    num_experts,
    D,
    F,
    num_chunks,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    LANE: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """The weighted sum of one token's experts, ``BD`` numbers of it; see `expert_step`."""
    t = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids_TK + t * K + k)
        if expert < num_experts:
            added = tl.zeros([BC, BD], tl.float32)
            entry = (t * K + k).to(tl.int64) * num_chunks
            num_ours = num_chunks
            if LANE:
                split = tl.where(tl.load(failed_1) == 1, F, tl.load(split_E + expert))
                num_ours = tl.cdiv(split, BF)
            for start in range(0, num_chunks, BC):
                c = start + tl.arange(0, BC)
                inside = (c[:, None] < num_ours) & (d[None, :] < D)
                at = (entry + c[:, None]) * D + d[None, :]
                added += tl.load(partial_NCD + at, mask=inside, other=0.0)
            value = tl.sum(added, 0)
            if LANE:
                theirs = answer_ND + (t * K + k).to(tl.int64) * D + d
                value += tl.load(theirs, mask=(d < D) & (split < F), other=0.0, volatile=True)
            if HAS_BIAS:
                record = tl.load(address_E + expert).to(tl.pointer_type(DTYPE))
                bias = record + F.to(tl.int64) * (R * D) + F * (R - 1) + d
                value += tl.load(bias, mask=d < D, other=0.0).to(tl.float32)
            total += value * tl.load(weights_TK + t * K + k).to(tl.float32)
    tl.store(output_TD + t * D + d, total.to(output_TD.dtype.element_ty), mask=d < D)
