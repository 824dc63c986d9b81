"""The predictor of a served model: how it watches, what came of it, and what happens when it fails.

Knows nothing of how forecasts are made, nor of what backends do with them.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from data.adapters import MoELayer
from predictors.base import Predictor
from runtime.backend import Backend, OffloadStats
from runtime.device_passes import DevicePasses
from runtime.forecasts import FALLBACK_POLICY, ForecastCounts, make_observer
from runtime.host_forecasts import HostForecasts
from runtime.observer import Observer
from runtime.policies import make_policy
from runtime.policies.base import Policy

logger = logging.getLogger(__name__)


class ServedPredictor:
    """Lets a predictor watch a model and tell its backend what to expect, until `remove`.

    Args:
        model: The model, on its device.
        layers: Its MoE layers.
        backend: Serves its experts.
        predictor: Fitted for it, and bound to it.
        on_change: Called where captured steps are out of date, also from within one.
        next_use_LE: As `make_observer` has it.
        silence: Called where the predictor has failed, before ``on_change``: who prefetches by it
            shall not go on.

    Attributes:
        observer: How it watches.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        layers: Sequence[MoELayer],
        backend: Backend,
        predictor: Predictor,
        on_change: Callable[[], None],
        next_use_LE: Tensor | None = None,
        silence: Callable[[], None] | None = None,
    ) -> None:
        self._backend, self._on_change, self._silence = backend, on_change, silence
        self._policy: Policy | None = None  # that the fallback stands in for
        self._counts = ForecastCounts(predictor.kind)
        self.observer = make_observer(
            model=model,
            layers=layers,
            predictor=predictor,
            backend=backend,
            counts=self._counts,
            on_failure=self._go_without,
            on_change=on_change,
            next_use_LE=next_use_LE,
        )

    def routed(self, layer: int, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        """A layer has chosen its experts, and will compute them next."""
        if isinstance(self.observer, DevicePasses):
            self.observer.routed(layer, topk_expert_ids_TK, topk_weights_TK)

    def why_not_captured(self) -> str | None:
        """As `DevicePasses.why_not_captured`."""
        observer = self.observer
        return observer.why_not_captured() if isinstance(observer, DevicePasses) else None

    def add_to(self, stats: OffloadStats) -> OffloadStats:
        """The same figures, with those of the forecasts."""
        observer = self.observer
        beside = observer if isinstance(observer, HostForecasts) else None
        if isinstance(observer, Observer):
            stats = dataclasses.replace(
                stats,
                judged_experts=self._counts.judged_experts,
                foreseen_experts=self._counts.foreseen_experts,
                lessons_put_off=observer.num_lessons_put_off,
            )
        return dataclasses.replace(
            stats,
            predictor=self._counts.predictor,
            predictor_failed=self._counts.is_off,
            predictor_forgets=self._counts.forgets,
            forecasts_used=self._counts.used,
            forecast_age_tokens=self._counts.age_tokens,
            passes_shed=0 if beside is None else beside.num_shed,
            passes_stale=0 if beside is None else beside.num_stale,
        )

    def remove(self) -> None:
        """Stop watching and let the backend keep as it did before; a second call does nothing.

        What it searches or learns on a thread is not waited for, since requests may be (`join`).
        """
        self.observer.remove()
        if self._policy is not None:
            self._backend.use_policy(self._policy)
            self._policy = None

    def join(self, timeout_s: float) -> bool:
        """After `remove`, wait for its threads; whether they are at rest."""
        return self.observer.join(timeout_s)

    def _go_without(self, error: Exception) -> None:
        """The predictor has failed: keep what is worth keeping by a policy that needs none."""
        self._counts.is_off = True
        logger.warning(
            "Predictor %s has failed and is switched off; policy %s from here on",
            self._counts.predictor,
            FALLBACK_POLICY,
            exc_info=error,
        )
        if self._silence is not None:
            self._silence()
        before = self._backend.use_policy(make_policy(FALLBACK_POLICY))
        self._policy = self._policy or before  # views of one predictor may fail one after the other
        self._on_change()
