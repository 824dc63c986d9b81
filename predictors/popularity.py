"""Popularity: every token is expected to use what tokens used on average.

The floor for every learned predictor, and the start of several of them. Knows neither the prompt
nor the past.
"""

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.routing import mean_use_LE


class Popularity(Predictor):
    """Mean use per (layer, expert) over the decode rows of the fitting requests.

    Calibrated by construction, as far as new topics route like the fitted ones.

    Args:
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "popularity"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request"})

    def __init__(self, *, gamma: float = 0.95) -> None:
        super().__init__(gamma=gamma)
        self._forecast: Forecast | None = None

    def fit(self, traces: TraceSet) -> FitReport:
        """Average the requests whose split is "fit"."""
        start_s = time.perf_counter()
        popularity_LE, num_requests, num_tokens = mean_use_LE(traces)
        self.load_state(traces.spec, {"popularity_LE": popularity_LE})
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """The same forecast for every request."""
        self.fitted_spec()
        state.forecast = self._forecast
        return state.forecast

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"gamma": self.gamma}

    def tensors(self) -> Mapping[str, Tensor]:
        """`popularity_LE`, float32."""
        return {} if self._forecast is None else {"popularity_LE": self._forecast.next_LE}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec
        self._forecast = Forecast.stationary(tensors["popularity_LE"], gamma=self.gamma)
