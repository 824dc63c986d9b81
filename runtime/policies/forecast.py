"""Eviction by forecast: Belady's rule with a learned view of the future."""

from typing import ClassVar

from torch import Tensor

from runtime.policies.base import Foresight, Policy, Usage


class ByForecast(Policy):
    """Keep what the predictor expects to be used most, soonest."""

    name = "forecast"
    foresight: ClassVar[Foresight] = "forecast"
    scores_are_forecasts: ClassVar[bool] = True

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """The forecast itself."""
        if forecast_LE is None:
            raise ValueError(f"policy {self.name!r} needs a forecast: name a predictor")
        return forecast_LE
