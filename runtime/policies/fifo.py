"""First in, first out: the baseline that looks at nothing but arrival."""

from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField


class Fifo(Policy):
    """Keep what arrived last."""

    name = "fifo"
    uses: frozenset[UsageField] = frozenset({"inserted"})

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """Minus the steps since insertion: relative, since float32 is exact only up to 2**24."""
        return (usage.inserted_LE - usage.step_L1).float()
