"""Least-Stale: what this forward pass has not touched goes before what it has (SpecMD)."""

import torch
from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField


class LeastStale(Policy):
    """Evict what earlier passes left behind, and of that first what this pass has passed over.

    An expert is current if this forward pass used or prefetched it, else stale. Three classes, each
    from the longest unused to the latest:

    1. stale, of a layer that this pass has served: not needed before the next pass;
    2. stale, of a layer still to come: perhaps needed soon;
    3. current.

    Where every layer has its own cache (`num_layers` 1), all that may be evicted is of class 1: the
    policy *is* LRU there, and only prefetched experts make a difference. It is meant for one pool.

    Source: SpecMD, arXiv 2602.03921, known to us by its abstract and by what three implementations
    say of it: they agree that stale goes before current and old before new; that layers passed
    over go before those to come is one's reading of the paper's "spatial" locality. Without the
    latter, and without prefetches, the order is LRU's in a pool too, since whatever this pass
    touched is younger than anything that it did not.

    Args:
        num_layers: Layers that take turns in one pool, the experts of layer l being the l-th of as
            many equal parts; 1 where each layer has its own cache.
    """

    name = "least_stale"
    uses: frozenset[UsageField] = frozenset({"last_use"})

    def __init__(self, *, num_layers: int = 1) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}: must be at least 1")
        self.num_layers = num_layers

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """Below 0, in (0, 1) and above 1 for the three classes, exact for 2**22 steps."""
        age_LE = usage.age_LE
        num_experts = age_LE.shape[-1]
        if num_experts % self.num_layers:
            raise ValueError(
                f"num_layers={self.num_layers} does not divide the pool's {num_experts} experts"
            )
        # Steps of this pass before the present one, which is also the layer being served.
        served_L1 = (usage.step_L1 - 1) % self.num_layers
        ids_E = torch.arange(num_experts, device=age_LE.device)
        layer_E = ids_E // (num_experts // self.num_layers)
        stale_LE = torch.where(
            layer_E <= served_L1, -age_LE.float(), (age_LE + 1).float().reciprocal()
        )
        return torch.where(age_LE <= served_L1, (served_L1 - age_LE + 2).float(), stale_LE)
