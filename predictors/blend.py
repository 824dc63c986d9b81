"""Blend: several predictors as one, each trusted as far as the "val" requests showed.

Knows its members by the `Predictor` interface alone.

Shape letters: M members · L MoE layers · E experts per layer · T tokens · R rows: tokens for which
every member had a forecast.
"""

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from data.schema import MoESpec, Trace, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State, Walked
from predictors.pooling import Rows, least_squares, pool_log_odds, rows_of
from predictors.request_history import RequestHistory
from predictors.routing import decode_rows, expert_use_TLE, traces_of
from predictors.token_use import log_odds

logger = logging.getLogger(__name__)

_MAX_ROWS = 4096  # a few weights per layer need no more: 131,072 entries per layer at 32 experts


@dataclass(slots=True)
class BlendState(State):
    """One request's past: that of each member, and what each said last."""

    states: list[State] = field(default_factory=list)
    said: list[Forecast | None] = field(default_factory=list)


class Blend(Predictor):
    """A calibrated combination: weights per layer, learned on the "val" requests.

    - Next use: log odds = bias + sum of weight x the member's log odds, by logistic regression of
      what tokens used. A member may get a negative weight: where two others both contain
      popularity, popularity counts against itself. In a layer where no combination has less log
      loss on "val" than one member, all weight is that member's: on "val", a blend's log loss is
      at most its best member's.
    - Later use (and what `on_routed` says, where a member speaks there; the others are then taken
      at forecast - next): non-negative least squares against the true discounted use. Rows near a
      request's end count as far as their future was recorded.

    Where a member has nothing to say, the others are averaged with equal weights. So are all where
    there is no "val" request. At the "layer" moment, of which traces hold no inputs, the mean of
    those who speak is passed on, at the fewest layers ahead that one of them reaches.

    Args:
        members: Unfitted predictors by name; a name is an identifier, since files are named by it.
        gamma: Discount per token of `Forecast.forecast_LE`; the members' must be the same.
    """

    kind: ClassVar[str] = "blend"
    moments: frozenset[Moment]  # type: ignore[misc]  # its members' together

    def __init__(self, *, members: Mapping[str, Predictor], gamma: float = 0.95) -> None:
        super().__init__(gamma=gamma)
        if not members:
            raise ValueError("members={}: a blend needs at least one")
        for name, member in members.items():
            if not name.isidentifier():
                raise ValueError(f"members: {name!r} is no identifier")
            if member.needs_truth:
                raise ValueError(f"members.{name}: {member.kind!r} reads the recorded future")
            if member.needs_model:
                raise ValueError(
                    f"members.{name}: {member.kind!r} reads the model itself, a blend does not"
                )
            if member.gamma != gamma:
                raise ValueError(f"members.{name}.gamma={member.gamma}: must be gamma={gamma}")
        # Weights go by position, and manifests sort their keys: one order, whoever wrote it down.
        self.members = {name: members[name] for name in sorted(members)}
        self.moments = frozenset().union(*(member.moments for member in members.values()))
        self._weights_ML = self._later_ML = self._routed_ML = torch.zeros(0, 0)
        self._bias_L = torch.zeros(0)

    def fit(self, traces: TraceSet) -> FitReport:
        """Fit every member, then the weights on the "val" requests."""
        start_s = time.perf_counter()
        reports = {name: member.fit(traces) for name, member in self.members.items()}
        self.spec = traces.spec
        num_layers, num_members = traces.spec.num_layers, len(self.members)
        equal_ML = torch.full((num_members, num_layers), 1.0 / num_members)
        self._weights_ML = self._later_ML = self._routed_ML = equal_ML
        self._bias_L = torch.zeros(num_layers)
        rows = self._rows(traces)
        details: dict[str, Any] = {"weighted": rows is not None}
        if rows is None:
            logger.warning("no 'val' token with a forecast of every member: equal weights")
        else:
            self._weights_ML, self._bias_L, losses = pool_log_odds(rows.next_MRLE, rows.used_RLE)
            self._later_ML = least_squares(rows.later_MRLE, rows)
            self._routed_ML = least_squares(rows.routed_MRLE, rows)
            *alone, blended = losses
            details["val_log_loss"] = {
                "blend": blended,
                **dict(zip(self.members, alone, strict=True)),
            }
        for key, weights_ML in (("next", self._weights_ML), ("later", self._later_ML)):
            means = weights_ML.mean(dim=1).tolist()
            details[f"mean_{key}_weight"] = dict(zip(self.members, means, strict=True))
        details["members"] = {name: report.details for name, report in reports.items()}
        return FitReport(
            max(report.num_requests for report in reports.values()),
            max(report.num_tokens for report in reports.values()),
            time.perf_counter() - start_s,
            details,
        )

    def new_state(self) -> BlendState:
        """An empty past of each member."""
        states = [member.new_state() for member in self.members.values()]
        return BlendState(states=states, said=[None] * len(states))

    def with_history(self, history: RequestHistory) -> Self:
        """A view whose members read ``history``; itself where none does."""
        members = {name: member.with_history(history) for name, member in self.members.items()}
        if all(members[name] is member for name, member in self.members.items()):
            return self
        view = copy.copy(self)
        view.members = members
        return view

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """What the members say of the prompt, together."""
        assert isinstance(state, BlendState)
        self.fitted_spec()
        said = [member.on_request(own, request) for member, own in self._each(state)]
        return self._take(state, said)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Show every member the token."""
        assert isinstance(state, BlendState)
        state.num_tokens += 1
        ids = {"token_id": token_id, "next_token_id": next_token_id}
        said = [member.on_token(own, expert_map_LE, **ids) for member, own in self._each(state)]
        return self._take(state, said)

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> Tensor | None:
        """The mean of those who speak."""
        assert isinstance(state, BlendState)
        inputs = (layer, router_input_TD, router_probs_TE)
        said = [member.on_layer(own, *inputs) for member, own in self._each(state)]
        known = [next_TEH for next_TEH in said if next_TEH is not None]
        if not known:
            return None
        ahead = min(next_THE.shape[1] for next_THE in known)
        return torch.stack([next_THE[:, :ahead] for next_THE in known]).mean(dim=0)

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        """Later use, of members that have nothing to say here as they said it before the token."""
        assert isinstance(state, BlendState)
        if "routed" not in self.moments:
            return None
        said: list[Tensor | None] = []
        for (member, own), forecast in zip(self._each(state), state.said, strict=True):
            later_E = member.on_routed(own, layer, router_probs_E)
            if later_E is None and forecast is not None:
                later_E = (forecast.forecast_LE - forecast.next_LE)[layer]
            said.append(later_E)
        later_E = _weighted(said, self._routed_ML[:, layer, None])
        return torch.zeros_like(router_probs_E) if later_E is None else later_E

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        """The members walk, each in its own fastest way."""
        spec = self.fitted_spec()
        walked = [member.walk(trace) for member in self.members.values()]
        forecasts: list[Forecast | None] = []
        last: Sequence[Forecast | None] | None = None
        for said in zip(*(one.forecasts for one in walked), strict=True):
            # One object as long as nobody says anything new: judging counts on that.
            unchanged = last is not None and all(a is b for a, b in zip(said, last, strict=True))
            forecasts.append(forecasts[-1] if unchanged else self._combined(said))
            last = said
        later_TLE = None
        if "routed" in self.moments:
            later_TLE = torch.zeros(trace.num_tokens, spec.num_layers, spec.num_experts)
            for t, row_LE in enumerate(later_TLE):
                said_LE = [_routed_LE(one, t) for one in walked]
                later_LE = _weighted(said_LE, self._routed_ML[..., None])
                if later_LE is not None:
                    row_LE.copy_(later_LE)
        return Walked(forecasts, later_TLE)

    def config(self) -> dict[str, Any]:
        """Its members as entries of their kind, config and embedder, and gamma."""
        return {
            "members": {name: _entry(member) for name, member in self.members.items()},
            "gamma": self.gamma,
        }

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights, and each member's tensors behind its name and a dot."""
        own = {
            "weights_ML": self._weights_ML,
            "bias_L": self._bias_L,
            "later_ML": self._later_ML,
            "routed_ML": self._routed_ML,
        }
        for name, member in self.members.items():
            own |= {f"{name}.{key}": tensor for key, tensor in member.tensors().items()}
        return {key: tensor.clone() for key, tensor in own.items()}  # no two share memory

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.spec = spec
        self._weights_ML, self._bias_L = tensors["weights_ML"], tensors["bias_L"]
        self._later_ML, self._routed_ML = tensors["later_ML"], tensors["routed_ML"]
        for name, member in self.members.items():
            start = f"{name}."
            own = {
                key.removeprefix(start): tensor
                for key, tensor in tensors.items()
                if key.startswith(start)
            }
            member.load_state(spec, own)

    def _each(self, state: BlendState) -> Iterator[tuple[Predictor, State]]:
        return zip(self.members.values(), state.states, strict=True)

    def _take(self, state: BlendState, said: list[Forecast | None]) -> Forecast | None:
        news = any(one is not other for one, other in zip(said, state.said, strict=True))
        state.said = said
        if news or state.forecast is None:
            state.forecast = self._combined(said)
        return state.forecast

    def _combined(self, said: Sequence[Forecast | None]) -> Forecast | None:
        known = [forecast for forecast in said if forecast is not None]
        if not known:
            return None
        odds = [None if forecast is None else log_odds(forecast.next_LE) for forecast in said]
        later = [None if forecast is None else forecast[1] - forecast[0] for forecast in said]
        logit_LE = _weighted(odds, self._weights_ML[..., None])
        later_LE = _weighted(later, self._later_ML[..., None])
        assert logit_LE is not None
        assert later_LE is not None
        if len(known) == len(said):
            logit_LE = logit_LE + self._bias_L[:, None]
        next_LE = logit_LE.sigmoid()
        return Forecast(next_LE, next_LE + later_LE)

    def _rows(self, traces: TraceSet) -> Rows | None:
        """Up to 4096 "val" tokens, evenly spaced, as every member saw them."""
        num_experts = traces.spec.num_experts
        lengths = [trace.num_tokens for trace in traces_of(traces, "val")]
        step = max(1, -(-sum(lengths) // _MAX_ROWS))
        history = RequestHistory()
        members = [member.with_history(history) for member in self.members.values()]
        parts: list[Rows] = []
        for trace in traces_of(traces, "val"):
            if not trace.num_tokens:
                continue
            walked = [member.walk(trace) for member in members]
            history.add_trace(trace, num_experts)
            use_TLE = torch.from_numpy(expert_use_TLE(trace, num_experts)).float()
            kept = [
                t
                for t in range(decode_rows(trace).start, trace.num_tokens, step)
                if all(one.forecasts[t] is not None for one in walked)
            ]
            if kept:
                parts.append(rows_of(walked, use_TLE, kept, self.gamma))
        if not parts:
            return None
        stacked = [
            torch.cat(part, dim=1 if part[0].ndim == 4 else 0) for part in zip(*parts, strict=True)
        ]
        return Rows(*stacked)


def _entry(member: Predictor) -> dict[str, Any]:
    """What an artifact needs to construct a member: kind, config, embedder."""
    embedder = member.embedder
    return {
        "kind": member.kind,
        "config": member.config(),
        "embedder": None
        if embedder is None
        else {
            "kind": embedder.kind,
            "config": embedder.config(),
            "fingerprint": embedder.fingerprint,
        },
    }


def _weighted(said: Sequence[Tensor | None], weights_M: Tensor) -> Tensor | None:
    """Sum of weight x value; plain mean of those who speak where one does not; None for none."""
    known = [values for values in said if values is not None]
    if not known:
        return None
    if len(known) < len(said):
        return torch.stack(known).mean(dim=0)
    return (torch.stack(known) * weights_M).sum(dim=0)


def _routed_LE(walked: Walked, t: int) -> Tensor | None:
    """Use after row t as told once it was routed, or by whoever does not, before."""
    if walked.later_TLE is not None:
        return walked.later_TLE[t]
    forecast = walked.forecasts[t]
    return None if forecast is None else forecast.forecast_LE - forecast.next_LE
