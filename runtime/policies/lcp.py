"""Least cache priority: frequency that fades while an expert idles (MoEpic)."""

import math

from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField


class Lcp(Policy):
    """Keep what is used often, its count divided by 4 for every 128 steps without a use.

    ``mu * rho^(nu / omega)``: mu uses so far, nu steps since the latest. Scores are its logarithm,
    which orders alike and does not underflow (the power itself is 0 in float32 after 9,500 idle
    steps at the defaults, and everything older would tie).

    Source: MoEpic §3.3, with its constants. What the paper leaves open, and what holds here:

    - A step is a token where each layer has its own cache, as in the paper. In one pool it is a
      layer's turn: multiply omega by the number of layers there.
    - A prompt served as one event counts once for each expert, however many of its tokens use it.
    - What a prefetch brings starts with no idle steps; never used, it goes first.

    Args:
        rho: What is left of a count after omega idle steps, in (0, 1]; 1 never forgets.
        omega: Steps, positive. Small values are close to LRU, large ones to LFU.
    """

    name = "lcp"
    uses: frozenset[UsageField] = frozenset({"last_use", "use_count"})

    def __init__(self, *, rho: float = 0.25, omega: float = 128.0) -> None:
        if not 0.0 < rho <= 1.0:
            raise ValueError(f"rho={rho}: must be in (0, 1]")
        if not 0.0 < omega < math.inf:
            raise ValueError(f"omega={omega}: must be a positive number of steps")
        self._log2_per_step = math.log2(rho) / omega

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """``log2(mu) + nu / omega * log2(rho)``; -inf for what was never used."""
        return usage.use_count_LE.float().log2() + usage.age_LE.float() * self._log2_per_step
