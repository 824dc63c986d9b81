"""Fakes that several test folders share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Predictor


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
