"""Trajectory search: a token that began like a stored one goes on like it.

Source: FineMoE §4.2.2 (Eq. 5). The half of FineMoE that needs neither prompts nor token ids, only
the router probabilities of the layers so far. `predictors.finemoe` adds the other half.

Shape letters: L MoE layers · E experts per layer · T tokens · D hidden · H layers ahead.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.schema import MoESpec, Trace, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.calibrate import Calibration, fit_calibration
from predictors.map_store import Keys, MapStore, PrefixSearch
from predictors.prefetch_order import Prefetch, PrefetchPlan
from predictors.routing import traces_of

logger = logging.getLogger(__name__)

TIE_BREAK = 1e-3  # below any probability that a used expert has


@dataclass(slots=True, kw_only=True)
class TrajectoryState(State):
    """One request's past.

    Attributes:
        plan: What the current iteration is expected to need.
        search: The current iteration's, from its layer 0 on.
        token_id: The current iteration's input token, or None if it is not known.
    """

    plan: PrefetchPlan
    search: PrefixSearch | None = None
    token_id: int | None = None


class Trajectory(Predictor):
    """The stored token whose layers so far were routed most alike says what the others will be.

    After layer l it finds the record with the greatest cosine between the flattened rows 0..l of
    the two maps, and says that record's rows l+1..l+d. The last of them, ``l + prefetch_distance``,
    is the paper's target, with the paper's key; `plan` holds these targets alone. The rows nearer
    by were targets of earlier layers, for the paper's copies are under way by then; here they are
    said again, since a longer key found them: row h is what a search at distance h would say.

    Choices that the paper leaves open, and deviations:

    - A record is one token of a fitted request, prefill tokens too. (The paper speaks of an
      iteration without saying how a prompt of many tokens becomes one map; its code stores each.)
    - A trace that recorded only the K used experts gives sparse maps, renormalised; without their
      probabilities, 1/K each (`Trace.expert_map_LE`). Then the K experts hold all the mass, and the
      delta threshold of Eq. 6-8 never asks for more than K of a single record.
    - ``neighbours`` > 1 averages the M nearest maps and their cosines, weighed by a softmax over
      those cosines; the paper takes one.
    - Experts that the found map does not tell apart (zeros of a sparse map) are ranked by the
      store's mean map, which never overrules it.
    - Before layer 0 all records are equally near, so the forecast is their mean, calibrated. The
      paper says nothing there (`predictors.finemoe` does), and nor does `plan`.
    - Layer forecasts are the found router probabilities, as the paper's prefetch order needs them;
      they rank, and are not calibrated.

    The store is filled from the "fit" requests. Offline it then stays as it is; ``online`` adds
    each finished token, from requests of all callers: that is what a store is for, so in online
    mode requests do influence later ones. An empty store says nothing.

    Args:
        capacity: C, records kept; when full, the most redundant one is replaced.
        prefetch_distance: d, layers between a router's output and the layer it is used for.
        neighbours: M, records averaged.
        online: Go on adding records after `fit`, which may have found none.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "trajectory"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token", "layer"})

    def __init__(
        self,
        *,
        capacity: int = 4096,
        prefetch_distance: int = 3,
        neighbours: int = 8,
        online: bool = False,
        gamma: float = 0.95,
    ) -> None:
        super().__init__(gamma=gamma)
        at_least_1 = {
            "capacity": capacity,
            "prefetch_distance": prefetch_distance,
            "neighbours": neighbours,
        }
        for name, value in at_least_1.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.capacity = capacity
        self.prefetch_distance = prefetch_distance
        self.neighbours = neighbours
        self.online = online
        self._adding = online
        self._store: MapStore | None = None
        self._calibration = Calibration.identity()

    @property
    def num_layers_ahead(self) -> int:
        """H of `on_layer`: the prefetch distance."""
        return self.prefetch_distance

    @property
    def store(self) -> MapStore:
        """The records; ValueError before `fit` or `load_state`."""
        self.fitted_spec()
        assert self._store is not None
        return self._store

    def fit(self, traces: TraceSet) -> FitReport:
        """Store the tokens of the "fit" requests; calibrate on the "val" requests.

        Raises:
            ValueError: The model has fewer MoE layers than ``prefetch_distance``, or a request's
                probabilities are not finite.
        """
        start_s = time.perf_counter()
        self._store = self._new_store(traces.spec)
        self.spec = traces.spec
        self._calibration = Calibration.identity()
        num_requests = num_tokens = 0
        for trace in traces_of(traces, "fit"):
            num_requests += 1
            num_tokens += trace.num_tokens
            if trace.num_tokens:
                maps_TLE = _maps_TLE(trace, traces.spec.num_experts)
                self._store.add(maps_TLE, self._keys_of(trace))
        details: dict[str, Any] = {"num_stored": len(self._store)}
        if not num_tokens:
            log = logger.info if self.online else logger.warning
            log("no routed token has split 'fit': the store of %r is empty", self.kind)
        else:
            self._adding = False  # calibrating must not store the "val" requests
            self._calibration, calibrated = fit_calibration(self, traces)
            details |= calibrated
        self._adding = self.online
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s, details)

    def new_state(self) -> TrajectoryState:
        """An empty past."""
        return TrajectoryState(plan=PrefetchPlan(top_k=self.fitted_spec().top_k))

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """The mean of the store; None while it is empty."""
        assert isinstance(state, TrajectoryState)
        return self._begin_iteration(state, None)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Store the finished token in online mode; then the same as `on_request`."""
        assert isinstance(state, TrajectoryState)
        state.num_tokens += 1
        if self._adding:
            known_id = state.token_id if token_id is None else token_id
            self.store.add(expert_map_LE[None], self._key(state, known_id))
        return self._begin_iteration(state, next_token_id)

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor | None, router_probs_TE: Tensor
    ) -> Tensor | None:
        """What the record that began most alike used in layers l+1..l+H.

        Args:
            state: The request's past; updated in place. Layer 0 begins a new iteration.
            layer: The layer that has been routed; layers come in order.
            router_input_TD: Not read.
            router_probs_TE: float, of T tokens that pass the layers together.

        Returns:
            float32 [T, H, E] router probabilities; NaN where there is no such layer. None while the
            store is empty.

        Raises:
            ValueError: A layer was left out, or the probabilities are not finite or not [T, E].
        """
        assert isinstance(state, TrajectoryState)
        spec = self.fitted_spec()
        if layer == 0:
            state.search = self.store.begin(len(router_probs_TE))
        expected = 0 if state.search is None else state.search.num_layers
        if state.search is None or layer != expected:
            raise ValueError(f"layer={layer}: layers are told in order, and {expected} is next")
        state.search.extend(router_probs_TE)
        if not len(self.store):
            return None
        match = state.search.search(self.neighbours)
        next_THE = torch.full(
            (len(router_probs_TE), self.num_layers_ahead, spec.num_experts), float("nan")
        )
        mean_LE = self.store.mean_LE
        coming = slice(layer + 1, layer + 1 + self.prefetch_distance)
        rows_HTE = self.store.rows_LTE(match, coming)
        ranked_HTE = rows_HTE + TIE_BREAK * mean_LE[coming, None]
        next_THE[:, : len(rows_HTE)] = ranked_HTE.transpose(0, 1)
        if len(rows_HTE) == self.prefetch_distance:
            state.plan.add(layer + self.prefetch_distance, rows_HTE[-1], match.scores_T)
        return next_THE

    def plan(self, state: State, layer_now: int = -1) -> list[Prefetch]:
        """What the current iteration should still prefetch, most urgent first.

        Args:
            state: The request's past.
            layer_now: The layer being executed; -1 before layer 0.
        """
        assert isinstance(state, TrajectoryState)
        return state.plan.order(layer_now)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("capacity", "prefetch_distance", "neighbours", "online", "gamma")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> Mapping[str, Tensor]:
        """The records and the calibration's knots."""
        if self._store is None:
            return {}
        return {**self._store.tensors(), **self._calibration.tensors()}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec
        self._store = self._new_store(spec)
        self._store.load(tensors)
        self._calibration = Calibration.from_tensors(tensors)

    def _new_store(self, spec: MoESpec) -> MapStore:
        return MapStore(
            capacity=self.capacity,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            prefetch_distance=self.prefetch_distance,
        )

    def _keys_of(self, trace: Trace) -> Keys:
        """The keys of a trace's tokens."""
        return Keys.unknown(trace.num_tokens, self.store.dim)

    def _key(self, state: TrajectoryState, token_id: int | None) -> Keys:
        """The key of one iteration of a request."""
        return Keys.unknown(1, self.store.dim)

    def _begin_iteration(self, state: TrajectoryState, token_id: int | None) -> Forecast | None:
        state.plan.clear()
        state.search = None
        state.token_id = token_id
        state.forecast = self._expected(state) if len(self.store) else None
        return state.forecast

    def _expected(self, state: TrajectoryState) -> Forecast:
        """What is expected of an iteration that is about to begin; the store is not empty."""
        return self._said(self.store.mean_LE)

    def _said(self, map_LE: Tensor) -> Forecast:
        return Forecast.stationary(self._calibration(map_LE), gamma=self.gamma)


def _maps_TLE(trace: Trace, num_experts: int) -> Tensor:
    """float32 [T, L, E], the expert map of every routed token of a trace."""
    maps = [trace.expert_map_LE(t, num_experts) for t in range(trace.num_tokens)]
    maps_TLE = torch.from_numpy(np.stack(maps))
    if not maps_TLE.isfinite().all():
        raise ValueError(f"request {trace.request_id!r}: its probabilities hold NaN or infinity")
    return maps_TLE
