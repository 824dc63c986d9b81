"""Forecaster: learns from a request's past when each expert will be used again.

The plug-in: what is learned lies in `forecaster_net`, what it reads in `token_history`, and how it
is trained in `fit.forecaster`. How it gets along with text that it was not fitted on: `follower`.

Shape letters: L MoE layers · E experts per layer · K experts per token · G discounts · V tokens ·
T tokens · R rows of a history.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from data.schema import MoESpec, Trace, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State, Walked
from predictors.calibrate import Calibration, fit_calibration
from predictors.follower import Followed, Follower, Said
from predictors.forecaster_graph import ForecasterGraph
from predictors.forecaster_net import Before, ForecasterNet
from predictors.next_layers import NextLayers
from predictors.request_history import RequestHistory
from predictors.routing import mean_use_LE
from predictors.shared_net import SharedNet, rule_of, rule_tensors
from predictors.token_history import NUM_TOKENS_READ, History, histories_of, tokens_read_N3

_WALK_TOKENS = 1024  # whose forecasts are computed at once


@dataclass(slots=True)
class ForecasterState(State):
    """One request's past.

    Attributes:
        history: What the nets read.
        tokens: Embedding rows of the next token, the last one and the one before.
        said: What each net said before the token at hand.
        carried: The same, with what that token's layers have passed on so far.
        followed: What is learned from once the request is over; None where nobody remembers it.
    """

    history: History | None = None
    tokens: tuple[int, ...] = ()
    said: list[Before] = field(default_factory=list)
    carried: list[Before] = field(default_factory=list)
    followed: Followed | None = None


class Forecaster(Predictor):
    """Small networks that forecast the distance to every expert's next use, strictly causally.

    Source: ours (DESIGN section 2 has the first try). What made it better on gpt-oss-20b
    (docs/log.md has the figures): copies of what followed earlier places of the same request that
    ended in the same tokens, or were routed alike; heavy dropout and weight decay; the age of an
    expert's last use; a target that discounts the next use and not all uses; and the layers of the
    token at hand.

    Deviation from the contract's `Forecast.forecast_LE`: it is the mean over ``discounts`` g of
    E[g^(d-1)], with d the distance to the expert's *next* use, not a sum over all its uses: that is
    what an eviction asks. `on_routed` answers in the same unit.

    The networks learn one model's routing on one kind of text, and on another they lose to LFRU
    (docs/log.md). So where requests are remembered (`with_history`), a small rule that is the same
    for all experts runs along, learns from each finished request, and speaks in the networks' stead
    where it has been the better one: of what comes next, of what to keep, or of both.

    Without token ids it goes by routing alone; without recorded probabilities each used expert
    counts the same; prefill rows are read like decode rows. Prompt texts are not read.

    Args:
        discounts: g, each in (0, 1): horizons of about 1 / (1 - g) tokens.
        hidden_dim: Of each network.
        num_nets: Networks whose probabilities are averaged; each costs as much as the first.
        epochs: Passes over the fitted tokens.
        batch_size: Tokens per step.
        learning_rate: The highest of the schedule.
        weight_decay: AdamW's, on matrices.
        dropout: Of inputs and hidden units; token embeddings have 0.3.
        token_capacity: At most so many tokens have an embedding, the most frequent ones.
        max_fit_tokens: Memory bound, 27 bytes x L x E a token on the device that trains: of a
            larger set, whole requests are left out, evenly spaced.
        seed: Of initialisation, order and dropout.
        trainer: Where to train (`fit.training`); not part of what is learned.

    Attributes:
        nets: The networks, float32 on the CPU; none before `fit` or `load_state`.
    """

    kind: ClassVar[str] = "forecaster"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token", "routed"})

    def __init__(
        self,
        *,
        discounts: Sequence[float] = (0.7, 0.9, 0.96),
        hidden_dim: int = 1024,
        num_nets: int = 1,
        epochs: int = 10,
        batch_size: int = 512,
        learning_rate: float = 2e-3,
        weight_decay: float = 1.0,
        dropout: float = 0.5,
        token_capacity: int = 8192,
        max_fit_tokens: int = 200_000,
        seed: int = 0,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        if not discounts or not all(0 < discount < 1 for discount in discounts):
            raise ValueError(f"discounts={list(discounts)}: must be one or more in (0, 1)")
        super().__init__(gamma=max(discounts))
        if token_capacity < 0 or weight_decay < 0:
            raise ValueError(
                f"token_capacity={token_capacity}, weight_decay={weight_decay}: must not be below 0"
            )
        if learning_rate <= 0:
            raise ValueError(f"learning_rate={learning_rate}: must be above 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be in [0, 1)")
        self.discounts = [float(discount) for discount in discounts]
        self.hidden_dim, self.num_nets, self.dropout = hidden_dim, num_nets, dropout
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.token_capacity, self.max_fit_tokens = token_capacity, max_fit_tokens
        for name in ("hidden_dim", "num_nets", "epochs", "batch_size", "max_fit_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        self._trainer = trainer
        self.nets: list[ForecasterNet] = []
        self._shared: SharedNet | None = None  # none in artifacts from before there was one
        self._follower: Follower | None = None
        self._popularity_LE = torch.zeros(0, 0)
        self._token_rows: dict[int, int] = {}
        self._calibration = Calibration.identity()

    def fit(self, traces: TraceSet) -> FitReport:
        """Train on the "fit" requests; calibrate on the "val" requests.

        Raises:
            MoecastError: A recorded probability is not finite.
            ValueError: Nothing to fit on, or training diverged.
        """
        from predictors.fit.allocator import freed_memory_kept

        with freed_memory_kept():
            return self._fit(traces)

    def _fit(self, traces: TraceSet) -> FitReport:
        laps_s = [time.perf_counter()]
        from predictors.fit.fitting_set import vocabulary, within_memory
        from predictors.fit.forecaster import examples_of, fit_net  # loads lightning
        from predictors.fit.next_layers import fit_next_layers
        from predictors.fit.shared_net import fit_shared_net
        from predictors.fit.training import device_of

        device = device_of(self._trainer)
        self.spec = traces.spec
        self._popularity_LE, num_requests, num_tokens = mean_use_LE(traces)
        fitted = within_memory(traces, self.max_fit_tokens)
        self._token_rows = vocabulary(fitted, self.token_capacity)
        examples = examples_of(
            fitted, self._popularity_LE.to(device), traces.spec.top_k, self._token_rows
        )
        laps_s.append(time.perf_counter())
        recipe = "discounts epochs batch_size learning_rate weight_decay"
        settings = {name: getattr(self, name) for name in recipe.split()}
        settings |= {"net": self._net_sizes(), "trainer": self._trainer}
        seeds = [self.seed + 1000 * n for n in range(self.num_nets)]
        self.nets = [fit_net(examples, **settings, seed=seed) for seed in seeds]
        for net in self.nets:  # an artifact holds halves: what is judged is what is served
            for parameter in net.parameters():
                parameter.requires_grad_(False).copy_(parameter.half())
            net.to(device)
        laps_s.append(time.perf_counter())
        self._calibration = Calibration.identity()
        self._shared = self._follower = None  # what is calibrated is what the networks say
        self._calibration, details = fit_calibration(self, traces)
        laps_s.append(time.perf_counter())
        self.next_layers = fit_next_layers(self, traces, seed=self.seed, device=device)
        for net in self.nets:
            net.cpu()
        laps_s.append(time.perf_counter())
        self._shared = fit_shared_net(
            fitted, self._popularity_LE.shape, self.spec.top_k, self.discounts, seed=self.seed
        )
        laps_s.append(time.perf_counter())
        parts = ("features_s", "training_s", "calibration_s", "next_layers_s", "rule_s")
        details |= {
            **dict(zip(parts, np.diff(laps_s).tolist(), strict=True)),
            "num_parameters": sum(p.numel() for net in self.nets for p in net.parameters()),
            "num_known_tokens": len(self._token_rows),
            "num_fitted_tokens": len(examples.examples_M),
        }
        return FitReport(num_requests, num_tokens, laps_s[-1] - laps_s[0], details)

    def with_history(self, history: RequestHistory) -> Self:
        """A view that follows ``history``'s requests, where an artifact has the rule for it."""
        if self._shared is None:
            return self
        view, popularity_LE, K = copy.copy(self), self._popularity_LE, self.fitted_spec().top_k
        view._follower = Follower(
            self._shared, history, discounts=self.discounts, popularity_LE=popularity_LE, top_k=K
        )
        return view

    def new_state(self) -> ForecasterState:
        """An empty past."""
        return ForecasterState()

    @torch.no_grad()
    def on_request(self, state: State, request: Request) -> Forecast | None:
        """What a request's first token is likely to use, whatever it asks."""
        assert isinstance(state, ForecasterState)
        state.history = History(self._popularity_LE, self.fitted_spec().top_k)
        state.tokens = (len(self._token_rows),) * NUM_TOKENS_READ
        state.followed = None if self._follower is None else self._follower.begin()
        return self._say(state)

    @torch.no_grad()
    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Add the token to the request's past and look ahead again."""
        ids, next_ids = [token_id], [next_token_id]
        maps_1LE = expert_map_LE[None]
        return self.on_tokens(state, maps_1LE, token_ids_T=ids, next_token_ids_T=next_ids)

    @torch.no_grad()
    def on_tokens(
        self,
        state: State,
        expert_maps_TLE: Tensor,
        *,
        token_ids_T: Sequence[int | None],
        next_token_ids_T: Sequence[int | None],
    ) -> Forecast | None:
        """The same for all of a prompt's tokens: the networks look ahead once, after the last.

        So nobody knows what would have been said before each: a prompt is not learned from.
        """
        assert isinstance(state, ForecasterState)
        assert state.history is not None, "on_request comes before a token"
        state.num_tokens += len(token_ids_T)
        state.history.add_all(
            expert_maps_TLE, token_ids_T=token_ids_T, next_token_ids_T=next_token_ids_T
        )
        if state.followed is not None and len(token_ids_T) > 1:
            state.followed.skip(len(token_ids_T))
        elif state.followed is not None:
            state.followed.add(state.history.rows_RLE[None])
        past = [self._row(token) for token in reversed(token_ids_T[1 - NUM_TOKENS_READ :])]
        tokens = (self._row(next_token_ids_T[-1]), *past, *state.tokens[1:])
        state.tokens = tokens[:NUM_TOKENS_READ]
        return self._say(state)

    @torch.no_grad()
    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        """What the layer needs after this token, from its own and the earlier layers' routing."""
        assert isinstance(state, ForecasterState)
        assert state.history is not None, "on_request comes before on_routed"
        if layer == 0:  # also where a forward pass was broken off and the token comes again
            state.carried = list(state.said)
        rows_RE = state.history.after_RE(layer, router_probs_E)
        if state.followed is not None and state.followed.rule_keeps:
            return self._discounted(state.followed.later(rows_RE, layer))
        later = []
        for n, net in enumerate(self.nets):
            later_GE, state.carried[n] = net.after_layer(state.carried[n], layer, rows_RE)
            later.append(later_GE.sigmoid())
        return self._discounted(torch.stack(later).mean(0))

    @torch.no_grad()
    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        """The same forecasts, many tokens at once, on the device where the networks are."""
        device, K = self.nets[0].read.weight.device, self.fitted_spec().top_k
        past_NRLE, copies_TRLE = histories_of(trace, self._popularity_LE.to(device), K)
        tokens_T3 = tokens_read_N3(trace, self._token_rows)[:-1].long().to(device)
        forecasts: list[Forecast | None] = []
        later = [self._popularity_LE.expand(0, -1, -1)]
        followed = None if self._follower is None else self._follower.begin()
        for start in range(0, trace.num_tokens, _WALK_TOKENS):
            part = torch.arange(start, min(start + _WALK_TOKENS, trace.num_tokens))
            before, after = (
                torch.cat([past_NRLE[rows], copies_TRLE[part]], dim=1) for rows in (part, part + 1)
            )
            said = [net.before(before, tokens_T3[part]) for net in self.nets]
            forecasts += map(Forecast, *self._forecast(followed, before, said))
            if followed is not None and followed.rule_keeps:
                later_TLGE = followed.later(after)
            else:
                each = [
                    net.after(one, after).sigmoid()
                    for net, one in zip(self.nets, said, strict=True)
                ]
                later_TLGE = torch.stack(each).mean(0)
            later.append(self._discounted(later_TLGE).cpu())
            if followed is not None:  # nobody is told of the last token
                followed.add(after[: trace.num_tokens - 1 - start])
        return Walked(forecasts, torch.cat(later))

    def graph_module(self, *, batch_size: int, kernels: bool = True) -> ForecasterGraph:
        """The fitted networks' forecasts inside a CUDA graph.

        Where requests are remembered, and the rule that follows them leads, the host says something
        else: a log line tells. Where they are not, the host says the same.
        """
        if self._follower is not None:
            self._follower.warn_of_graph()
        return ForecasterGraph(
            nets=copy.deepcopy(self.nets),
            popularity_LE=self._popularity_LE,
            token_ids_V=torch.tensor(list(self._token_rows), dtype=torch.int64),
            discounts=self.discounts,
            calibration=self._calibration,
            top_k=self.fitted_spec().top_k,
            batch_size=batch_size,
            kernels=kernels,
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without the trainer."""
        names = (
            "discounts hidden_dim num_nets epochs batch_size learning_rate weight_decay dropout "
            "token_capacity max_fit_tokens seed"
        )
        return {name: getattr(self, name) for name in names.split()}

    def tensors(self) -> Mapping[str, Tensor]:
        """Networks and ways, float16; known tokens' ids; rule, popularity, calibration, float32."""
        if not self.nets:
            return {}
        return {
            "token_ids_V": torch.tensor(list(self._token_rows), dtype=torch.int64),
            "popularity_LE": self._popularity_LE,
            **self._calibration.tensors(),
            **rule_tensors(self._shared),
            **({} if self.next_layers is None else self.next_layers.tensors()),
            **{
                f"nets.{n}.{name}": tensor.half()
                for n, net in enumerate(self.nets)
                for name, tensor in net.state_dict().items()
            },
        }

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; what was saved before there was a rule follows no requests."""
        self.spec = spec
        self._popularity_LE = tensors["popularity_LE"]
        self._calibration = Calibration.from_tensors(tensors)
        self.next_layers = NextLayers.from_tensors(tensors)
        ids_V: list[int] = tensors["token_ids_V"].tolist()
        self._token_rows = {token: row for row, token in enumerate(ids_V)}
        self._shared, self._follower = rule_of(tensors, num_discounts=len(self.discounts)), None
        self.nets = []
        for n in range(self.num_nets):
            net = ForecasterNet(**self._net_sizes()).eval()
            net.load_state_dict(
                {name: tensors[f"nets.{n}.{name}"].float() for name in net.state_dict()}
            )
            self.nets.append(net.requires_grad_(False))

    def _net_sizes(self) -> dict[str, Any]:
        spec = self.fitted_spec()
        return {
            "num_layers": spec.num_layers,
            "num_experts": spec.num_experts,
            "num_tokens": len(self._token_rows),
            "num_discounts": len(self.discounts),
            "hidden_dim": self.hidden_dim,
            "dropout": self.dropout,
        }

    def _row(self, token_id: int | None) -> int:
        unknown = len(self._token_rows)
        return unknown if token_id is None else self._token_rows.get(token_id, unknown)

    def _say(self, state: ForecasterState) -> Forecast:
        assert state.history is not None
        rows_1RLE, tokens_13 = state.history.rows_RLE[None], torch.tensor([state.tokens])
        state.said = [net.before(rows_1RLE, tokens_13) for net in self.nets]
        next_1LE, forecast_1LE = self._forecast(state.followed, rows_1RLE, state.said)
        state.forecast = Forecast(next_1LE[0], forecast_1LE[0])
        return state.forecast

    def _forecast(
        self, followed: Followed | None, rows_TRLE: Tensor, said: Sequence[Before]
    ) -> Forecast:
        """What is said before each of a request's next tokens: float32 [T, L, E]."""
        next_TLE, ahead_TLE = self._mean(said)
        if followed is None:
            return Forecast(next_TLE, torch.maximum(next_TLE, ahead_TLE))
        return followed.say(rows_TRLE, Said(next_TLE, ahead_TLE))

    def _mean(self, said: Sequence[Before]) -> tuple[Tensor, Tensor]:
        """Calibrated *next* and *ahead* of all networks together, on the CPU."""
        next_BLE = torch.stack([one.next_BLE.sigmoid() for one in said]).mean(0)
        ahead_BLE = torch.stack([one.ahead_BLE.sigmoid() for one in said]).mean(0)
        return self._calibration(next_BLE.cpu()), ahead_BLE.cpu()

    def _discounted(self, later_GE: Tensor) -> Tensor:
        """The mean over discounts, one token further away: the unit of ``forecast - next``."""
        discounts_G1 = torch.tensor(self.discounts, device=later_GE.device)[:, None]
        return (discounts_G1 * later_GE).mean(-2)
