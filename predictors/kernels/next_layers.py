"""The layers to come, in one launch, once a layer has routed: `predictors.next_layers` on a GPU.

A program answers for one layer. Of the weights it reads K rows a token.

Shape letters: T tokens · K experts per token · L MoE layers · E experts per layer (X, of the layer
that has routed) · D layers that are told of it · H layers that are asked about.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _look_ahead(
    ids_TK,
    way_XDE,
    next_LE,
    scale_L,
    bias_LE,
    sums_TLE,
    said_LE,
    layer,
    num_tokens,
    num_layers,
    num_experts,
    depth,
    num_asked,
    least,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
):
    distance = tl.program_id(0)  # less one
    target = layer + 1 + distance
    e, k = tl.arange(0, E_BLOCK), tl.arange(0, K_BLOCK)
    inside = e < num_experts
    at = target * num_experts + e
    probability = tl.load(next_LE + at, mask=inside, other=0.5)
    probability = tl.minimum(tl.maximum(probability, least), 1.0 - least)
    log_odds = tl.log(probability / (1.0 - probability)) * tl.load(scale_L + target)
    log_odds += tl.load(bias_LE + at, mask=inside, other=0.0)
    unused = tl.zeros([E_BLOCK], tl.float32) + 1.0
    for t in range(num_tokens):
        total = tl.zeros([E_BLOCK], tl.float32)
        if distance < depth:
            ids = tl.load(ids_TK + t * K + k, mask=k < K, other=-1).to(tl.int32)
            real = (ids >= 0) & (ids < num_experts)
            rows = (ids[:, None] * depth + distance) * num_experts + e[None, :]
            ways = tl.load(way_XDE + rows, mask=real[:, None] & inside[None, :], other=0.0)
            sums = sums_TLE + (t * num_layers + target) * num_experts + e
            # The first layer that it is told by begins anew.
            goes_on = inside & (layer > 0) & (distance + 1 < depth)
            total = tl.load(sums, mask=goes_on, other=0.0) + tl.sum(ways, 0)
            tl.store(sums, total, mask=inside)
        unused *= 1.0 - 1.0 / (1.0 + tl.exp(-(log_odds + total)))
    tl.store(said_LE + at, 1.0 - unused, mask=inside & (distance < num_asked))


def look_ahead(
    *,
    layer: int,
    topk_expert_ids_TK: Tensor,
    way_LXDE: Tensor,
    next_LE: Tensor,
    scale_L: Tensor,
    bias_LE: Tensor,
    sums_TLE: Tensor,
    said_LE: Tensor,
    num_asked: int,
    least: float,
) -> None:
    """Answer for the layers behind one that has routed.

    Args:
        layer: Which has.
        topk_expert_ids_TK: int64, contiguous; ids of E and above are nobody's.
        way_LXDE: float32, what each expert of each layer adds to the layers behind it.
        next_LE: float32, probabilities before anything of these tokens was known.
        scale_L: float32, of their log odds.
        bias_LE: float32, added to them.
        sums_TLE: float32, what the layers before have added; written.
        said_LE: float32, that any of the tokens uses an expert; H rows are written.
        num_asked: H.
        least: Probabilities are taken to be this far from 0 and from 1.
    """
    num_layers, num_experts, depth, _ = way_LXDE.shape
    num_tokens, top_k = topk_expert_ids_TK.shape
    num_targets = min(max(depth, num_asked), num_layers - 1 - layer)
    _look_ahead[(num_targets,)](
        topk_expert_ids_TK,
        way_LXDE[layer],
        next_LE,
        scale_L,
        bias_LE,
        sums_TLE,
        said_LE,
        layer,
        num_tokens,
        num_layers,
        num_experts,
        depth,
        num_asked,
        least,
        K=top_k,
        K_BLOCK=triton.next_power_of_2(top_k),
        E_BLOCK=max(16, triton.next_power_of_2(num_experts)),
        num_warps=1,  # it runs beside the experts, which leave few registers
    )
