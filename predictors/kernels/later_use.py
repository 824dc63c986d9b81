"""A layer's later use in one launch, between its router and its experts.

`predictors.forecaster_graph.ForecasterGraph` says in torch what is computed. There it is some
sixteen launches a layer, of which each takes longer to start than to run; here it is one, and what
it reads is what matters: a token's map and use have K nonzeros each, so that of the matrices that
they are multiplied with, 2 * K rows are read and no more.

A program answers for a few experts of one (net, row). What a layer passes on, every program works
out for itself: that is a few kilobytes, and waiting for another's would be a launch of its own.

Shape letters: B rows of a batch · N nets · E experts per layer · K experts per token ·
I = 2 * E: a map and a use side by side · G discounts · Q carried · J = G * E · S = N * B.
"""

import triton
import triton.language as tl
from torch import Tensor

EXPERTS_PER_PROGRAM = 8
"""32 bytes of a row of weights, the least that a GPU fetches; few, so that a program ends soon."""


@triton.jit
def _answer(
    ids_BK,
    probs_BK,
    carried_NBQ,
    passed_on_NBQ,
    pass_on_NIQ,
    take_NQJ,
    mix_NIJ,
    own_NJ,
    said_NBJ,
    used_NBJ,
    share_G,
    map_BE,
    use_BE,
    answers_SE,
    row_stride,
    num_rows,
    num_experts,
    top_k,
    carry_dim,
    num_discounts,
    K_BLOCK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    PASSES_ON: tl.constexpr,
):
    s = tl.program_id(1)
    net, row = (s // num_rows).to(tl.int64), (s % num_rows).to(tl.int64)
    s = s.to(tl.int64)
    num_columns = num_discounts * num_experts
    k, q, j = tl.arange(0, K_BLOCK), tl.arange(0, Q_BLOCK), tl.arange(0, G_BLOCK * E_BLOCK)
    first = tl.program_id(0) * E_BLOCK
    e, e_J, g_J = first + tl.arange(0, E_BLOCK), first + j % E_BLOCK, j // E_BLOCK
    inside_Q = q < carry_dim
    inside_J = (e_J < num_experts) & (g_J < num_discounts)
    column_J = g_J * num_experts + e_J

    # What does not depend on the routing is under way before the first wait for it.
    take_QJ = tl.load(
        take_NQJ + (net * carry_dim + q[:, None]) * num_columns + column_J[None, :],
        mask=inside_Q[:, None] & inside_J[None, :],
        other=0.0,
    )
    said_J = tl.load(said_NBJ + s * num_columns + column_J, mask=inside_J, other=0.0)
    used_J = tl.load(used_NBJ + s * num_columns + column_J, mask=inside_J, other=0.0)
    own_J = tl.load(own_NJ + net * num_columns + column_J, mask=inside_J, other=0.0)
    share_J = tl.load(share_G + g_J, mask=inside_J, other=0.0)
    carried_Q = tl.load(carried_NBQ + s * carry_dim + q, mask=inside_Q, other=0.0)

    ids_K = tl.load(ids_BK + row * top_k + k, mask=k < top_k, other=-1).to(tl.int32)
    probs_K = tl.load(probs_BK + row * top_k + k, mask=k < top_k, other=0.0).to(tl.float32)
    probs_K = probs_K / tl.sum(probs_K, 0)
    real_K = (ids_K >= 0) & (ids_K < num_experts)
    map_row_K = net * 2 * num_experts + ids_K
    use_row_K = map_row_K + num_experts
    known_KQ, known_KJ = real_K[:, None] & inside_Q[None, :], real_K[:, None] & inside_J[None, :]
    at_KQ, at_KJ = map_row_K[:, None] * carry_dim + q, map_row_K[:, None] * num_columns + column_J
    by_map_KQ = tl.load(pass_on_NIQ + at_KQ, mask=known_KQ, other=0.0)
    by_map_KJ = tl.load(mix_NIJ + at_KJ, mask=known_KJ, other=0.0)
    at_KQ, at_KJ = use_row_K[:, None] * carry_dim + q, use_row_K[:, None] * num_columns + column_J
    by_use_KQ = tl.load(pass_on_NIQ + at_KQ, mask=known_KQ, other=0.0)
    by_use_KJ = tl.load(mix_NIJ + at_KJ, mask=known_KJ, other=0.0)

    carried_Q += tl.sum(probs_K[:, None] * by_map_KQ + by_use_KQ, 0)
    if PASSES_ON:
        if tl.program_id(0) == 0:
            tl.store(passed_on_NBQ + s * carry_dim + q, carried_Q, mask=inside_Q)
    passed_Q = 0.5 * carried_Q * (1.0 + tl.erf(carried_Q * 0.7071067811865476))
    mixed_J = tl.sum(passed_Q[:, None] * take_QJ, 0)
    mixed_J += tl.sum(probs_K[:, None] * by_map_KJ + by_use_KJ, 0)

    same_KJ = (ids_K[:, None] == e_J[None, :]) & known_KJ
    map_J = tl.sum(tl.where(same_KJ, probs_K[:, None], 0.0), 0)
    use_J = tl.sum(same_KJ.to(tl.float32), 0)
    log_odds_J = mixed_J + said_J + map_J * own_J + use_J * used_J
    answer_J = share_J / (1.0 + tl.exp(-log_odds_J))
    answer_E = tl.sum(tl.reshape(answer_J, (G_BLOCK, E_BLOCK)), 0)
    tl.store(answers_SE + s * num_experts + e, answer_E, mask=e < num_experts)
    if net == 0:
        at_J, first_J = row * row_stride + e_J, inside_J & (g_J == 0)
        tl.store(map_BE + at_J, map_J, mask=first_J)
        tl.store(use_BE + at_J, use_J, mask=first_J)


def later_use(
    *,
    topk_expert_ids_BK: Tensor,
    topk_probs_BK: Tensor,
    carried_NBQ: Tensor,
    passed_on_NBQ: Tensor | None,
    pass_on_NIQ: Tensor,
    take_NQJ: Tensor,
    mix_NIJ: Tensor,
    own_NJ: Tensor,
    said_NBJ: Tensor,
    used_NBJ: Tensor,
    share_G: Tensor,
    map_BE: Tensor,
    use_BE: Tensor,
    answers_SE: Tensor,
) -> None:
    """Answer for every net and row what one layer's experts are worth after this token.

    All is float32 and contiguous but for what is said below.

    Args:
        topk_expert_ids_BK: Integers, no id twice in a row; what is no expert's id adds nothing.
        topk_probs_BK: Any floats in proportion to the experts' probabilities.
        carried_NBQ: What the layers before have passed on.
        passed_on_NBQ: Receives what the next layer is given; None behind the last one.
        pass_on_NIQ: `ForecasterNet.pass_on_LEQ` of the layer, each net's.
        take_NQJ: `ForecasterNet.take_LQE`, likewise.
        mix_NIJ: `ForecasterNet.mix_later_LEE`, likewise.
        own_NJ: What an expert's row of the map is multiplied with.
        said_NBJ: Log odds if the token uses no expert.
        used_NBJ: What is added to an expert's if it does.
        share_G: Each discount's weight in an answer.
        map_BE: Receives the token's map, normalised; contiguous in E.
        use_BE: Receives its use, likewise, with the same stride between rows.
        answers_SE: Receives the answers; their sum over S is the layer's later use.
    """
    (num_rows, top_k), num_experts = topk_expert_ids_BK.shape, map_BE.shape[-1]
    (num_nets, _, carry_dim), num_discounts = pass_on_NIQ.shape, len(share_G)
    g_block, q_block = map(triton.next_power_of_2, (num_discounts, carry_dim))
    e_block = max(EXPERTS_PER_PROGRAM, 32 // g_block)  # a column for each thread of a warp
    _answer[(triton.cdiv(num_experts, e_block), num_nets * num_rows)](
        topk_expert_ids_BK,
        topk_probs_BK,
        carried_NBQ,
        carried_NBQ if passed_on_NBQ is None else passed_on_NBQ,
        pass_on_NIQ,
        take_NQJ,
        mix_NIJ,
        own_NJ,
        said_NBJ,
        used_NBJ,
        share_G,
        map_BE,
        use_BE,
        answers_SE,
        map_BE.stride(0),
        num_rows,
        num_experts,
        top_k,
        carry_dim,
        num_discounts,
        K_BLOCK=triton.next_power_of_2(top_k),
        Q_BLOCK=q_block,
        G_BLOCK=g_block,
        E_BLOCK=e_block,
        PASSES_ON=passed_on_NBQ is not None,
        num_warps=4 if q_block * g_block * e_block <= 1 << 13 else 8,  # registers
    )
