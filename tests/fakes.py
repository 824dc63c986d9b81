"""Fakes that several test folders share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Predictor, State


class ScriptedPredictor(Predictor):
    """A predictor with nothing to learn: subclasses say what it forecasts."""

    def fit(self, traces: TraceSet) -> FitReport:
        raise AssertionError("a scripted predictor is not fitted")

    def config(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec


class Previous(ScriptedPredictor):
    """Expects the next token to be routed as the last one was."""

    kind = "previous"
    moments = frozenset({"token"})

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        return Forecast.stationary(expert_map_LE, gamma=self.gamma)
