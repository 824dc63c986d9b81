"""Frequency counted in other ways than by `lfu`: what explains where LFU wins and where it loses.

For replays only; what proves worth serving with belongs in `runtime.policies`.

Shape letters: L MoE layers · E experts per layer.
"""

import numpy as np
from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField
from runtime.policies.forecast import ByForecast
from runtime.replay import EventList


class LfuOfEachStay(Policy):
    """LFU as FineMoE counts, visits while resident; among equals the latest used."""

    name = "lfu of each stay"
    uses: frozenset[UsageField] = frozenset({"visits", "last_use"})

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """Visits, plus less than 1/2 for recency."""
        return usage.visits_LE.float() + (usage.age_LE + 2).float().reciprocal()


class LfuOfEachRequest(Policy):
    """LFU whose counts start anew with each request. Only for a replay: it reads values."""

    name = "lfu of each request"
    uses: frozenset[UsageField] = frozenset({"use_count", "last_use"})

    def __init__(self, events: EventList) -> None:
        changes = np.diff(events.trace_index, prepend=-1).nonzero()[0]
        self._first_steps = frozenset((changes + 1).tolist())
        self._before_LE: Tensor | None = None

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """Uses in this request, plus less than 1/2 for recency."""
        if int(usage.step_L1[0]) in self._first_steps:
            self._before_LE = usage.use_count_LE - (usage.age_LE == 0).long()
        assert self._before_LE is not None
        count_LE = usage.use_count_LE - self._before_LE
        return count_LE.float() + (usage.age_LE + 2).float().reciprocal()


class LfuWithHalfLife(Policy):
    """LFU in which every use is worth half after so many tokens."""

    name = "lfu with half-life"

    def __init__(self, half_life: int) -> None:
        self.half_lives = (float(half_life),)

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """The decayed count."""
        return usage.decayed_uses[self.half_lives[0]]


class ProbabilityTimesCount(ByForecast):
    """FineMoE's rule with our LFU's count: since the start, across evictions."""

    name = "p * count"
    uses: frozenset[UsageField] = frozenset({"use_count"})

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """``p * count``."""
        p_LE = super().keep_scores(usage, forecast_LE)
        return p_LE.clamp(min=2.0**-40) * usage.use_count_LE.float()


class ProbabilityTimesRecentUse(ByForecast):
    """FineMoE's rule with a count in which every use is worth half after so many tokens."""

    name = "p * recent use"

    def __init__(self, half_life: int) -> None:
        self.half_lives = (float(half_life),)

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """``p * decayed count``."""
        p_LE = super().keep_scores(usage, forecast_LE)
        return p_LE.clamp(min=2.0**-40) * usage.decayed_uses[self.half_lives[0]]
