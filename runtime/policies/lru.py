"""Least recently used: what nearly every offloading engine ships."""

from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField


class Lru(Policy):
    """Keep what was used last."""

    name = "lru"
    uses: frozenset[UsageField] = frozenset({"last_use"})

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """Minus the age: relative, since float32 is exact only up to 2**24 steps."""
        return (usage.last_use_LE - usage.step_L1).float()
