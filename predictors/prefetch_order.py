"""How many experts a found map is worth fetching, and which of them first.

Source: FineMoE §4.3 (Eq. 6-8) and §4.5. Knows nothing of stores, caches or copies: a prefetcher
reads `PrefetchPlan.order` and decides what of it is resident already.

Shape letters: E experts per layer · T tokens · K experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SLACK = 1e-6  # of summed float probabilities: a row that sums to 1 reaches a threshold of 1


class Prefetch(NamedTuple):
    """One expert worth fetching; the larger its priority, the sooner."""

    layer: int
    expert: int
    priority: float


class _Target(NamedTuple):
    probs_TE: Tensor
    scores_T: Tensor


def chosen_experts(probs_TE: Tensor, scores_T: Tensor, *, top_k: int) -> Tensor:
    """The experts to fetch: the worse the match, the more (Eq. 6-8).

    In descending probability (ties by expert id) until their sum reaches
    ``delta = clip(1 - score, 0, 1)``, the crossing expert included, and at least K of them.
    (The released code stops before the crossing one.)

    Args:
        probs_TE: float, at least 0. Rows are taken relative to their sum, so that a row of rounded
            probabilities can reach 1.
        scores_T: float, similarity of what they were found by.
        top_k: K.

    Returns:
        bool [T, E].
    """
    probs_TE = probs_TE.double()
    probs_TE = probs_TE / probs_TE.sum(dim=1, keepdim=True).clamp_min(1e-12)
    delta_T1 = (1.0 - scores_T.double()).clamp(0.0, 1.0)[:, None]
    sorted_TE, order_TE = probs_TE.sort(dim=1, descending=True, stable=True)
    before_TE = sorted_TE.cumsum(dim=1) - sorted_TE  # the sum that each one would be added to
    wanted_TE = before_TE < delta_T1 - _SLACK
    wanted_TE[:, :top_k] = True
    return torch.zeros_like(wanted_TE).scatter_(1, order_TE, wanted_TE)


class PrefetchPlan:
    """What one iteration is expected to need, layer by layer, as far as it is known.

    Args:
        top_k: K, the least number of experts chosen for a layer and token.
    """

    def __init__(self, *, top_k: int) -> None:
        self._top_k = top_k
        self._targets: dict[int, _Target] = {}

    @property
    def layers(self) -> list[int]:
        """The layers of which something is expected, ascending."""
        return sorted(self._targets)

    def clear(self) -> None:
        """A new iteration begins."""
        self._targets.clear()

    def add(self, layer: int, probs_TE: Tensor, scores_T: Tensor) -> None:
        """Expect ``probs_TE`` of a layer, found with these similarities."""
        self._targets[layer] = _Target(probs_TE, scores_T)

    def chosen_E(self, layer: int) -> Tensor:
        """What the layer needs, bool [E], for any of the tokens that are routed together."""
        return chosen_experts(*self._targets[layer], top_k=self._top_k).any(dim=0)

    def order(self, layer_now: int) -> list[Prefetch]:
        """All chosen experts of layers that are still to come, most urgent first.

        Priority is p / (layer - layer_now) (§4.5), p the largest over the tokens; ties go by layer,
        then expert.

        Args:
            layer_now: The layer being executed; -1 before layer 0, which is the paper's 0 with
                layers counted from 1.
        """
        found = []
        for layer in self.layers:
            if layer > layer_now:
                probs_E = self._targets[layer].probs_TE.amax(dim=0) / (layer - layer_now)
                chosen = self.chosen_E(layer).nonzero().flatten().tolist()
                found += [Prefetch(layer, expert, float(probs_E[expert])) for expert in chosen]
        return sorted(found, key=lambda item: (-item.priority, item.layer, item.expert))
