"""What `gate_mlp` may be trained for: losses that fit the choice of K experts.

Each takes scores [..., E], which experts were used (bool, K a row) and the router's probabilities,
both [..., E], and returns the loss of each row [...]. `docs/log.md` says which one won.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_TEMPERATURE = 0.5  # of `rank`; towards 0 only the strongest unused expert counts, as in `margin`


def bce(scores: Tensor, used: Tensor, shares: Tensor) -> Tensor:
    """Each expert by itself."""
    return F.binary_cross_entropy_with_logits(scores, used.float(), reduction="none").mean(-1)


def listwise(scores: Tensor, used: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy to the K experts used, evenly."""
    target = used.float() / used.sum(-1, keepdim=True)
    return -(target * scores.log_softmax(-1)).sum(-1)


def distil(scores: Tensor, used: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy to the router's own probabilities."""
    return -(shares * scores.log_softmax(-1)).sum(-1)


def rank(scores: Tensor, used: Tensor, shares: Tensor) -> Tensor:
    """Each used expert against all unused ones, which do not compete with the other used ones."""
    sharp = scores / _TEMPERATURE
    unused = sharp.masked_fill(used, -torch.inf).logsumexp(-1, keepdim=True)
    return _TEMPERATURE * (F.softplus(unused - sharp) * used).sum(-1) / used.sum(-1)


def margin(scores: Tensor, used: Tensor, shares: Tensor) -> Tensor:
    """Hinge: each used expert one above the strongest unused one."""
    unused = scores.masked_fill(used, -torch.inf).amax(-1, keepdim=True)
    return (F.relu(1.0 + unused - scores) * used).sum(-1) / used.sum(-1)


LOSSES: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "bce": bce,
    "listwise": listwise,
    "distil": distil,
    "rank": rank,
    "margin": margin,
}
