"""Previous token: the next token is expected to use what the last one used.

The baseline that every token-level predictor has to beat. Knows nothing of the prompt.
"""

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.calibrate import Calibration, fit_calibration
from predictors.routing import mean_use_LE

_TIE_BREAK = 1e-3  # below any probability that a used expert has


class PreviousToken(Predictor):
    """Ranks by the finished token's expert map, then by popularity; calibrated on "val".

    Before the first token there is only popularity. A trace that recorded just the K used experts
    leaves the others at probability 0: popularity orders those, and never overrules the map.

    Args:
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "previous_token"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token"})

    def __init__(self, *, gamma: float = 0.95) -> None:
        super().__init__(gamma=gamma)
        self._calibration = Calibration.identity()
        self._popularity_LE: Tensor | None = None

    def fit(self, traces: TraceSet) -> FitReport:
        """Average the "fit" requests; calibrate on the "val" requests."""
        start_s = time.perf_counter()
        self._popularity_LE, num_requests, num_tokens = mean_use_LE(traces)
        self.spec = traces.spec
        self._calibration = Calibration.identity()
        self._calibration, details = fit_calibration(self, traces)
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s, details)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Popularity."""
        self.fitted_spec()
        assert self._popularity_LE is not None
        state.forecast = Forecast.stationary(self._popularity_LE, gamma=self.gamma)
        return state.forecast

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """The same again."""
        assert self._popularity_LE is not None
        state.num_tokens += 1
        score_LE = expert_map_LE + _TIE_BREAK * self._popularity_LE
        state.forecast = Forecast.stationary(self._calibration(score_LE), gamma=self.gamma)
        return state.forecast

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"gamma": self.gamma}

    def tensors(self) -> Mapping[str, Tensor]:
        """`popularity_LE`, float32, and the calibration's knots."""
        if self._popularity_LE is None:
            return {}
        return {"popularity_LE": self._popularity_LE, **self._calibration.tensors()}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec
        self._popularity_LE = tensors["popularity_LE"]
        self._calibration = Calibration.from_tensors(tensors)
