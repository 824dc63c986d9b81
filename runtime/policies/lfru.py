"""Least frequently and recently used: the best heuristic known for expert caches."""

from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField


class Lfru(Policy):
    """Keep what is used often, discounted by the time since its last use.

    Source: "best causal policy LFRU = frequency / (age + 1)", arXiv 2608.07911; also the default of
    vLLM's expert cache proposal. Every gap that we report starts from it.
    """

    name = "lfru"
    uses: frozenset[UsageField] = frozenset({"last_use", "use_count"})

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """``count / (age + 1)``."""
        return usage.use_count_LE.float() / (usage.age_LE + 1).float()
