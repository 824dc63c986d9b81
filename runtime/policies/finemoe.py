"""Use while resident, weighted by the probability of being used again (FineMoE)."""

from typing import ClassVar

from torch import Tensor

from runtime.policies.base import Foresight, Policy, Usage, UsageField

# Stands in for a probability of 0, so that such experts go first and the least used of them before
# the others, which is LFU where nothing is known yet. No count that occurs makes up for it.
_NO_PROBABILITY = 2.0**-40


class FineMoE(Policy):
    """Evict the largest ``1 / (p * freq)``: keep what is likely and was visited often.

    freq counts the events that used the expert since it came in, this one included, and starts
    anew with each stay (`Usage.visits_LE`). Recency has no say, as the paper wants it.

    Source: FineMoE §4.5. Deviations:

    - The paper's p is the row of the map that was searched for this very iteration, spent whether
      the layer has run already or not. Ours is the forecast: until the layer has routed the token
      it expects that token too, from then on only what comes after (`policies.base.later_use`).
      Where a predictor expects every coming token to be alike, both order a layer equally.
    - The paper has no rule for ``p * freq = 0``: here those go first, by freq, then by id.
    """

    name = "finemoe"
    uses: frozenset[UsageField] = frozenset({"visits"})
    foresight: ClassVar[Foresight] = "forecast"

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """``p * freq``."""
        if forecast_LE is None:
            raise ValueError(f"policy {self.name!r} needs a forecast: name a predictor")
        return forecast_LE.clamp(min=_NO_PROBABILITY) * usage.visits_LE.float()
