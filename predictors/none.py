"""The null predictor: a cache without forecasts, so that nobody needs an `if`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Moment, Predictor


class Silent(Predictor):
    """Says nothing, at any moment: every forecast is None.

    Args:
        gamma: Accepted so that one override serves every predictor; has no effect.
    """

    kind: ClassVar[str] = "none"
    moments: ClassVar[frozenset[Moment]] = frozenset()

    def fit(self, traces: TraceSet) -> FitReport:
        """Remember which model the traces are of; read none of them."""
        self.spec = traces.spec
        return FitReport(num_requests=0, num_tokens=0, fit_s=0.0)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"gamma": self.gamma}

    def tensors(self) -> Mapping[str, Tensor]:
        """Nothing is learned."""
        return {}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec
