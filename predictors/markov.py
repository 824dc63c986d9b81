"""Markov: what tokens used after a token that used these experts, layer by layer.

The baseline that knows one token of the past and nothing else: neither the prompt, nor token ids,
nor anything before the finished token. Whoever claims to have learned more has to beat it.

Shape letters: L MoE layers · E experts per layer · K experts per token · T tokens · H layers ahead.
"""

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.schema import MoESpec, Trace, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State, Walked
from predictors.calibrate import Calibration, fit_calibration
from predictors.routing import decode_rows, expert_use_TLE, mean_use_LE, traces_of
from predictors.token_use import log_odds

_BATCH = 256  # tokens forecast at once in `walk`: bounds memory


class Markov(Predictor):
    """Per-layer transition tables, estimated by counting over the "fit" requests' decode rows.

    One table row answers one question: of the tokens whose predecessor used expert e, which share
    used expert e'? There are three tables of that shape:

    - ``next``: one token ahead, the same layer.
    - ``later``: the discounted use by the second and all further tokens, counted directly. Powers
      of ``next`` would forget the request at the speed at which single tokens differ, although a
      request keeps its topic.
    - ``cross``: the same token, h layers on, for `on_layer`.

    The finished token used K experts, so K rows answer. They are taken as independent evidence:
    each moves the log odds of e' away from popularity's by what its row says. Their mean, the other
    way to have one row per token, lets the rows that know nothing dilute the one that knows (slot
    recall@4 on gpt-oss-20b 0.43 against 0.49). Experts that come together are no independent
    witnesses, so what this says is too sure of itself; calibration on "val" takes that back for
    ``next``, and nothing does for `on_layer`, which is for ranking.

    Every row is smoothed: it starts as ``prior_tokens`` tokens of average use, so an expert that
    was never seen changes nothing. `on_routed` reads ``next`` and ``later`` for the layer that has
    just routed; only that layer's own routing enters. Router probabilities are not read beyond the
    K experts that they select, so traces without them lose nothing.

    Args:
        prior_tokens: Above 0.
        num_layers_ahead: H of `on_layer`, at least 1.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "markov"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token", "layer", "routed"})

    def __init__(
        self, *, prior_tokens: float = 10.0, num_layers_ahead: int = 4, gamma: float = 0.95
    ) -> None:
        super().__init__(gamma=gamma)
        if not prior_tokens > 0:
            raise ValueError(f"prior_tokens={prior_tokens}: must be above 0")
        if num_layers_ahead < 1:
            raise ValueError(f"num_layers_ahead={num_layers_ahead}: must be at least 1")
        self.prior_tokens = prior_tokens
        self.num_layers_ahead = num_layers_ahead
        self._tables: dict[str, Tensor] = {}
        self._gains: dict[str, Tensor] = {}
        self._calibration = Calibration.identity()

    def fit(self, traces: TraceSet) -> FitReport:
        """Count transitions of the "fit" requests; calibrate on the "val" requests."""
        start_s = time.perf_counter()
        popularity_LE, num_requests, num_tokens = mean_use_LE(traces)
        counts = _Counts(traces.spec, self.num_layers_ahead, self.gamma)
        for trace in traces_of(traces, "fit"):
            use_TLE = expert_use_TLE(trace, traces.spec.num_experts)[decode_rows(trace)]
            counts.add(torch.from_numpy(use_TLE).float())
        tables = counts.tables(popularity_LE, self.prior_tokens)
        self.load_state(traces.spec, {**tables, **Calibration.identity().tensors()})
        self._calibration, details = fit_calibration(self, traces)
        return FitReport(num_requests, num_tokens, time.perf_counter() - start_s, details)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Popularity."""
        self.fitted_spec()
        state.forecast = Forecast.stationary(self._tables["popularity_LE"], gamma=self.gamma)
        return state.forecast

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """What follows the finished token's experts; ids are not looked at."""
        state.num_tokens += 1
        used_1LK = expert_map_LE.topk(self.fitted_spec().top_k, dim=-1).indices[None]
        next_1LE, future_1LE = self._after(used_1LK, self._layers_L)
        state.forecast = Forecast(next_1LE[0], future_1LE[0])
        return state.forecast

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> Tensor | None:
        """What follows the experts of layer ``layer`` in the layers above it.

        Returns:
            float32 [T, H, E], H = `num_layers_ahead`; NaN where layer l+h does not exist.
        """
        used_TK = router_probs_TE.topk(self.fitted_spec().top_k, dim=-1).indices.cpu()
        ahead_THE = self._gains["cross_LEHE"][layer][used_TK].sum(dim=1)
        return torch.sigmoid(self._popularity_ahead_LHE[layer] + ahead_THE)

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        """What follows the experts that this layer has just chosen."""
        used_11K = router_probs_E.topk(self.fitted_spec().top_k, dim=-1).indices[None, None]
        _, future_11E = self._after(used_11K, torch.tensor([layer]))
        # One gamma more: seen from before this token, what follows it is at n = 2.
        return self.gamma * future_11E[0, 0]

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        """The same, many tokens at once."""
        spec = self.fitted_spec()
        forecasts = [self.on_request(self.new_state(), Request.of(trace))]
        later_TLE = torch.zeros(trace.num_tokens, spec.num_layers, spec.num_experts)
        for start in range(0, trace.num_tokens, _BATCH):
            rows = range(start, min(start + _BATCH, trace.num_tokens))
            map_TLE = np.stack([trace.expert_map_LE(t, spec.num_experts) for t in rows])
            used_TLK = torch.from_numpy(map_TLE).topk(spec.top_k, dim=-1).indices
            next_TLE, future_TLE = self._after(used_TLK, self._layers_L)
            later_TLE[rows.start : rows.stop] = self.gamma * future_TLE
            forecasts += map(Forecast, next_TLE, future_TLE)
        return Walked(forecasts[: max(1, trace.num_tokens)], later_TLE)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("prior_tokens", "num_layers_ahead", "gamma")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> Mapping[str, Tensor]:
        """The tables, float32, popularity, and the calibration's knots."""
        return {**self._tables, **self._calibration.tensors()} if self._tables else {}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec
        names = ("popularity_LE", "next_LEE", "later_LEE", "cross_LEHE")
        self._tables = {name: tensors[name] for name in names}
        self._calibration = Calibration.from_tensors(tensors)
        L, _, H, E = self._tables["cross_LEHE"].shape
        self._layers_L = torch.arange(L)
        self._popularity_LE = log_odds(self._tables["popularity_LE"])
        self._popularity_ahead_LHE = torch.full((L, H, E), float("nan"))
        for h in range(1, min(H, L - 1) + 1):
            self._popularity_ahead_LHE[:-h, h - 1] = self._popularity_LE[h:]
        self._gains = {
            "next_LEE": log_odds(self._tables["next_LEE"]) - self._popularity_LE[:, None],
            "later_LEE": log_odds(self._tables["later_LEE"]) - self._popularity_LE[:, None],
            "cross_LEHE": log_odds(self._tables["cross_LEHE"])
            - self._popularity_ahead_LHE[:, None],
        }

    def _after(self, used_TLK: Tensor, layers_L: Tensor) -> tuple[Tensor, Tensor]:
        """Next use and discounted future use after tokens that used these, [T, L, E] each."""

        def after(name: str) -> Tensor:
            gain_TLE = self._gains[name][layers_L[:, None], used_TLK].sum(dim=2)
            return torch.sigmoid(self._popularity_LE[layers_L] + gain_TLE)

        next_TLE = self._calibration(after("next_LEE"))
        return next_TLE, next_TLE + after("later_LEE") * (self.gamma / (1.0 - self.gamma))


class _Counts:
    """Co-occurrences, added up request by request.

    A request ends, and what its tokens would have used after that is unknown. So the far table is
    divided by the discount that was really observed; dividing by the number of tokens would teach
    that experts stop being used. What it holds is a share, to be scaled to an endless request.
    """

    def __init__(self, spec: MoESpec, num_layers_ahead: int, gamma: float) -> None:
        self._gamma = gamma
        L, E, H = spec.num_layers, spec.num_experts, num_layers_ahead
        self._next_LEE = torch.zeros(L, E, E)
        self._next_seen_LE = torch.zeros(L, E)
        self._later_LEE = torch.zeros(L, E, E)
        self._later_seen_LE = torch.zeros(L, E)  # in discounted tokens
        self._cross_LEHE = torch.zeros(L, E, H, E)
        self._cross_seen_LE = torch.zeros(L, E)

    def add(self, use_TLE: Tensor) -> None:
        """Count one request's rows, 0 or 1."""
        num_tokens = len(use_TLE)
        before_TLE = use_TLE[:-1]
        self._next_LEE += torch.einsum("tle,tlf->lef", before_TLE, use_TLE[1:])
        self._next_seen_LE += before_TLE.sum(dim=0)
        # Row t: sum over n >= 2 of gamma^(n-1) * use of row t+n, and the same sum of ones.
        later_TLE = torch.zeros_like(use_TLE)
        seen_T = torch.zeros(num_tokens)
        for t in range(num_tokens - 3, -1, -1):
            later_TLE[t] = self._gamma * (use_TLE[t + 2] + later_TLE[t + 1])
            seen_T[t] = self._gamma * (1.0 + seen_T[t + 1])
        self._later_LEE += torch.einsum("tle,tlf->lef", use_TLE, later_TLE)
        self._later_seen_LE += torch.einsum("tle,t->le", use_TLE, seen_T)
        self._cross_seen_LE += use_TLE.sum(dim=0)
        num_layers = use_TLE.shape[1]
        for h in range(1, min(self._cross_LEHE.shape[2], num_layers - 1) + 1):
            pairs_LEE = torch.einsum("tle,tlf->lef", use_TLE[:, :-h], use_TLE[:, h:])
            self._cross_LEHE[:-h, :, h - 1] += pairs_LEE

    def tables(self, popularity_LE: Tensor, prior_tokens: float) -> dict[str, Tensor]:
        """Smoothed shares."""
        L = len(popularity_LE)

        def shares(count_LEE: Tensor, seen_LE: Tensor, average_LE: Tensor) -> Tensor:
            prior_L1E = prior_tokens * average_LE[:, None]
            return (count_LEE + prior_L1E) / (seen_LE[..., None] + prior_tokens)

        next_LEE = shares(self._next_LEE, self._next_seen_LE, popularity_LE)
        later_LEE = shares(self._later_LEE, self._later_seen_LE, popularity_LE)
        cross_LEHE = torch.zeros_like(self._cross_LEHE)  # so it stays where layers end
        for h in range(1, min(cross_LEHE.shape[2], L - 1) + 1):
            cross_LEHE[:-h, :, h - 1] = shares(
                self._cross_LEHE[:-h, :, h - 1], self._cross_seen_LE[:-h], popularity_LE[h:]
            )
        return {
            "popularity_LE": popularity_LE,
            "next_LEE": next_LEE,
            "later_LEE": later_LEE,
            "cross_LEHE": cross_LEHE,
        }
