"""The oracle: reads the future from the recorded trace.

An upper bound for offline judging: with it, the policy "evict the lowest forecast" comes close to
Belady's optimum, and slot recall one token ahead is 1. It cannot be exported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.routing import expert_use_TLE


@dataclass(slots=True)
class OracleState(State):
    """The whole request.

    Attributes:
        next_TLE: float32, row t is the true use of row t (what is "next" before it is routed).
        future_TLE: float32, row t is the true discounted use of rows t, t+1, ...
    """

    next_TLE: Tensor | None = None
    future_TLE: Tensor | None = None


class Oracle(Predictor):
    """True use by the next token, and true discounted use until the end of the request.

    Args:
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "oracle"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token"})
    needs_truth: ClassVar[bool] = True

    def fit(self, traces: TraceSet) -> FitReport:
        """Remember which model the traces are of; the truth comes with each request."""
        self.spec = traces.spec
        return FitReport(num_requests=0, num_tokens=0, fit_s=0.0)

    def new_state(self) -> OracleState:
        """An empty past (and future)."""
        return OracleState()

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Read the whole trace.

        Raises:
            ValueError: The request comes without its truth.
        """
        assert isinstance(state, OracleState)
        if request.truth is None:
            raise ValueError(
                "predictor 'oracle' needs Request.truth: it judges recorded traces, it cannot serve"
            )
        use_TLE = expert_use_TLE(request.truth, self.fitted_spec().num_experts)
        future_TLE = use_TLE.astype(np.float32)
        for t in range(len(future_TLE) - 2, -1, -1):
            future_TLE[t] += np.float32(self.gamma) * future_TLE[t + 1]
        state.next_TLE = torch.from_numpy(use_TLE).float()
        state.future_TLE = torch.from_numpy(future_TLE)
        return self._say(state)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Move one token on; None after the last one."""
        assert isinstance(state, OracleState)
        state.num_tokens += 1
        return self._say(state)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"gamma": self.gamma}

    def tensors(self) -> Mapping[str, Tensor]:
        """Nothing is learned."""
        return {}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec

    @staticmethod
    def _say(state: OracleState) -> Forecast | None:
        assert state.next_TLE is not None
        assert state.future_TLE is not None
        t = state.num_tokens
        more = t < len(state.next_TLE)
        state.forecast = Forecast(state.next_TLE[t], state.future_TLE[t]) if more else None
        return state.forecast
