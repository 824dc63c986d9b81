"""Who forecasts for a served model, how often that counted, and what happens when it fails.

`make_observer` chooses the way that a predictor's forecasts take to a backend: in step with the
model on a CPU (`runtime.observer`), within captured steps on a GPU (`runtime.graph_forecasts`), or
from a thread of the host (`runtime.host_forecasts`). Whatever the way, a predictor that raises is
switched off: the model's outputs do not depend on it, so generation goes on without.

Shape letters: L MoE layers · E experts per layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from data.adapters import MoELayer
from predictors.base import Forecast, Predictor, Request, State
from predictors.lessons import Beside
from predictors.request_history import RequestHistory
from runtime.backend import Backend
from runtime.device_passes import DevicePasses
from runtime.graph_forecasts import GraphForecasts
from runtime.host_forecasts import HostForecasts
from runtime.observer import Observer

FALLBACK_POLICY = "lfru"
"""What takes over where there are no forecasts: the best heuristic on every trace measured."""


@dataclass(slots=True)
class ForecastCounts:
    """What became of one predictor's forecasts.

    Attributes:
        predictor: Its kind.
        used: Forward passes that had a forecast to go by.
        age_tokens: Summed over those: tokens of each request that were fed since the last one that
            the forecast knew. 0 unless the predictor runs on a thread of its own.
        is_off: It has failed.
        forgets: It does without finished requests, which it would go by on a host.
        judged_experts: Experts used by decoded tokens of which something was forecast; counted only
            where the predictor runs in step with the model.
        foreseen_experts: Those of them among the K forecast highest (slot recall@K is their share).
    """

    predictor: str
    used: int = 0
    age_tokens: int = 0
    is_off: bool = False
    forgets: bool = False
    judged_experts: int = 0
    foreseen_experts: int = 0

    def count(self, age_tokens: int = 0) -> None:
        """A forward pass has a forecast to go by."""
        self.used += 1
        self.age_tokens += age_tokens

    def judge(self, foreseen: int, used: int) -> None:
        """So many of the experts that a token has used were foreseen."""
        self.foreseen_experts += foreseen
        self.judged_experts += used


def make_observer(
    *,
    model: nn.Module,
    layers: Sequence[MoELayer],
    predictor: Predictor,
    backend: Backend,
    counts: ForecastCounts,
    on_failure: Callable[[Exception], None],
    on_change: Callable[[], None],
    next_use_LE: Tensor | None = None,
) -> Observer | DevicePasses:
    """Let ``predictor`` watch ``model`` and tell ``backend`` what to expect.

    Args:
        model: The model, on its device.
        layers: Its MoE layers.
        predictor: Fitted for it.
        backend: Serves its experts.
        counts: Where forecasts are counted.
        on_failure: Called with what the predictor raised, once.
        on_change: Called where captured steps are out of date for another reason.
        next_use_LE: float32, takes what is expected of the very next pass, for who prefetches.
    """

    def keep(forecast: Forecast) -> None:
        place_LE = backend.later_use()
        if next_use_LE is not None:
            next_use_LE.copy_(forecast.next_LE)
        backend.expect(torch.sub(forecast.forecast_LE, forecast.next_LE, out=place_LE))

    def keep_layer(layer: int, later_E: Tensor) -> None:
        backend.expect(later_E, layer)

    if backend.device is None:

        def keep_now(forecast: Forecast) -> None:
            counts.count()
            keep(forecast)

        guarded = cast(Predictor, _Guarded(predictor, on_failure))
        return Observer(
            model=model,
            layers=layers,
            predictor=guarded,
            on_forecast=keep_now,
            on_later=keep_layer,
            on_judged=counts.judge,
            lessons=Beside(),
        )
    common: dict[str, Any] = {
        "model": model,
        "layers": layers,
        "predictor": predictor,
        "device": backend.device,
        "on_forecast": keep,
        "on_pass": counts.count,
        "on_failure": on_failure,
    }
    with torch.inference_mode(False):  # whose tensors could be changed nowhere else
        module = predictor.graph_module(batch_size=1)
    if module is None:
        return HostForecasts(**common)
    inside = GraphForecasts(
        **common,
        module=module,
        on_later=keep_layer,
        later_use=backend.later_use,
        on_change=on_change,
    )
    counts.forgets = inside.forgets
    return inside


class _Guarded:
    """A predictor that has nothing more to say once it has raised."""

    def __init__(self, predictor: Predictor, on_failure: Callable[[Exception], None]) -> None:
        self._predictor, self._on_failure = predictor, on_failure
        self._is_off = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def with_history(self, history: RequestHistory) -> "_Guarded":
        view = self._predictor.with_history(history)
        return self if view is self._predictor else _Guarded(view, self._on_failure)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        return cast(Forecast | None, self._ask("on_request", state, request))

    def on_tokens(self, state: State, expert_maps_TLE: Tensor, **ids: Any) -> Forecast | None:
        return cast(Forecast | None, self._ask("on_tokens", state, expert_maps_TLE, **ids))

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        if self._is_off:
            return torch.zeros_like(router_probs_E)  # whose policy reads it no more
        later_E = self._ask("on_routed", state, layer, router_probs_E)
        return torch.zeros_like(router_probs_E) if self._is_off else cast(Tensor | None, later_E)

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> object:
        if self._is_off:
            return None
        try:
            return getattr(self._predictor, name)(*args, **kwargs)
        except Exception as error:
            self._is_off = True
            self._on_failure(error)
            return None
