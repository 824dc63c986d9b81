"""Least frequently used, over the whole past."""

from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField


class Lfu(Policy):
    """Keep what was used most often; among equals, what was used last.

    Counts are never reset, not even by an eviction. Equal counts are common in a young cache, and
    choosing the oldest of them reproduces the published replays of BigMoeOnEdge (lowest expert id
    costs half a point there).
    """

    name = "lfu"
    uses: frozenset[UsageField] = frozenset({"last_use", "use_count"})

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """The count, plus a recency term below 1/2 that can only order equal counts."""
        return usage.use_count_LE.float() + (usage.age_LE + 2).float().reciprocal()
