"""What a predictor is: one thin interface for everything that forecasts experts.

A predictor speaks at up to four moments, and keeps its per-request past in a `State` that the
caller owns (so that requests never share a past, and a batch is a list of states). What it may know
of earlier requests stands in a `RequestHistory`, which the caller owns too (`with_history`):

- **request** (`on_request`): the prompt is known, nothing has been routed yet.
- **token** (`on_token`): one token has passed all layers; its whole expert map is known, and so is
  the id of the token that will be fed next. Nothing of that next token's routing is.
- **layer** (`on_layer`): layer l has just routed this very token; says who is next at l+1..l+H.
- **routed** (`on_routed`): the same point; says what layer l itself will need after this token.
  Evictions spend this; who has nothing to say here is taken at `forecast - next`.

Forecasts are float32 torch tensors on the CPU unless a predictor says otherwise:

- `Forecast.next_LE`: probability that the next token uses each expert. Calibrated: a 0.3 comes
  true 30 % of the time. Rows sum to about K.
- `Forecast.forecast_LE`: the discounted future use, sum over n >= 1 of gamma^(n-1) * P(used by the
  n-th next token). `next_LE` is its first term. Prefetch, eviction, admission and budgets spend it.

A predictor is fitted once (`fit`), then only read. It is saved as plain tensors, plain values and
at most one FAISS index (`predictors.artifact`); nothing is pickled.

Shape letters: L MoE layers · E experts per layer · K experts per token · T tokens · N tokens of
several requests · D hidden · S embedding · H layers ahead.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from data.router_inputs import RoutedTokens
from data.schema import MoESpec, Trace, TraceSet
from predictors.embedders.base import Embedder
from predictors.graph import GraphPredictor
from predictors.next_layers import NextLayers
from predictors.request_history import RequestHistory

Moment = Literal["request", "token", "layer", "routed"]


class Forecast(NamedTuple):
    """How much each expert will be used soon; both float32 [L, E] (module docstring)."""

    next_LE: Tensor
    forecast_LE: Tensor

    @classmethod
    def stationary(cls, next_LE: Tensor, *, gamma: float) -> "Forecast":
        """The forecast of someone who expects every coming token to look like the next one."""
        return cls(next_LE, next_LE / (1.0 - gamma))


class Walked(NamedTuple):
    """What a predictor said while a recorded request was replayed (`Predictor.walk`).

    Attributes:
        forecasts: T of them: element t is what was known just before row t was routed, element 0
            from the prompt alone, element t from rows 0..t-1.
        later_TLE: float32, what `on_routed` said of row t in layer l, from rows 0..t-1 and from
            layers 0..l of row t; None where the predictor does not speak at that moment.
    """

    forecasts: Sequence[Forecast | None]
    later_TLE: Tensor | None


class WalkedLayers(NamedTuple):
    """What a predictor said while routed tokens were replayed layer by layer (`walk_layers`).

    Attributes:
        before_NLE: float32, `Forecast.next_LE` as it stood before the token was routed; NaN where
            there was none.
        ahead_LNHE: float32, what `on_layer` said after layer l of the token of layers l+1..l+H; NaN
            where it said nothing.
    """

    before_NLE: Tensor
    ahead_LNHE: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is known of a request before its first token is routed.

    Args:
        prompt: The prompt's text, or None if only ids are known.
        token_ids_P: int32 prompt ids, or None.
        prompt_embedding_S: float32 embedding by the predictor's own embedder, if the caller has it
            already (a trace store may); else the predictor embeds `prompt` itself.
        truth: The request's whole trace. Only the oracle may look, and only offline.
    """

    prompt: str | None = None
    token_ids_P: npt.NDArray[np.int32] | None = None
    prompt_embedding_S: npt.NDArray[np.float32] | None = None
    truth: Trace | None = None

    @classmethod
    def of(cls, trace: Trace, *, with_truth: bool = False) -> "Request":
        """The request behind a recorded trace; the future is left out unless asked for."""
        ids_P = trace.token_ids_P
        return cls(
            prompt=trace.prompt,
            token_ids_P=None if ids_P is None else ids_P[: trace.num_prompt_tokens],
            prompt_embedding_S=trace.prompt_embedding_S,
            truth=trace if with_truth else None,
        )


@dataclass(slots=True)
class State:
    """One request's past, owned by the caller; predictors with a longer memory subclass it.

    Attributes:
        forecast: The latest forecast, or None if the predictor has nothing to say yet.
        num_tokens: Tokens seen by `on_token` so far.
    """

    forecast: Forecast | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class FitReport:
    """What fitting cost and found; becomes part of the artifact's manifest."""

    num_requests: int
    num_tokens: int
    fit_s: float
    details: dict[str, Any] = field(default_factory=dict)


class Predictor(ABC):
    """Base of all predictors. Subclasses are keyword-only constructed from plain values.

    Attributes:
        kind: The predictor's name: file name, YAML name and the artifact's `kind`.
        moments: When it speaks.
        needs_truth: It reads `Request.truth`: it judges recorded traces and cannot be exported.
        needs_model: It reads the model's own modules: it must be given one by `bind`, before `fit`
            and again after it was loaded.
        embedder: What turns prompts into vectors, or None where it reads no text.
        members: The predictors that it is made of, by name; none but for a blend.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
        spec: The MoE it was fitted for; None before `fit` or `load_state`.
        next_layers: What it has learned of a token's layers from those before them, or None.
    """

    kind: ClassVar[str]
    moments: ClassVar[frozenset[Moment]]
    needs_truth: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    embedder: Embedder | None = None
    members: Mapping[str, "Predictor"] = MappingProxyType({})
    next_layers: NextLayers | None = None

    def __init__(self, *, gamma: float = 0.95) -> None:
        if not 0.0 <= gamma < 1.0:
            raise ValueError(f"gamma={gamma}: must be in [0, 1)")
        self.gamma = gamma
        self.spec: MoESpec | None = None

    def bind(self, model: nn.Module) -> None:  # noqa: B027 (most read no model)
        """Give it the model that it forecasts for; it keeps references and changes nothing there.

        Its routers and embeddings are thus neither copied into the artifact nor held twice.

        Args:
            model: A transformers model, on the device where it runs.

        Raises:
            SpecMismatchError: It was fitted for another model.
        """

    @abstractmethod
    def fit(self, traces: TraceSet) -> FitReport:
        """Learn from the traces whose split is "fit" (and calibrate on "val", if at all).

        Never reads a trace whose split is "test".
        """

    def new_state(self) -> State:
        """An empty past for one request."""
        return State()

    def with_history(self, history: RequestHistory) -> Self:
        """This predictor, reading the finished requests that the caller adds to ``history``.

        Returns:
            A view that shares everything learned, for those who remember requests; else itself.
        """
        return self

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Forecast from the prompt alone; None where this predictor has nothing to say yet."""
        return state.forecast

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Forecast after a token has passed all layers.

        Args:
            state: The request's past; updated in place.
            expert_map_LE: float32 [L, E], the finished token's router probabilities.
            token_id: The finished token's id, where known.
            next_token_id: The id that will be fed next, where known: sampling is over by now.
        """
        state.num_tokens += 1
        return state.forecast

    def on_tokens(
        self,
        state: State,
        expert_maps_TLE: Tensor,
        *,
        token_ids_T: Sequence[int | None],
        next_token_ids_T: Sequence[int | None],
    ) -> Forecast | None:
        """Forecast after tokens that passed all layers together, as those of a prompt do.

        Override it only to say the same faster: a test compares.

        Args:
            state: The request's past; updated in place.
            expert_maps_TLE: float32 [T, L, E], the tokens' maps in order, at least one.
            token_ids_T: Each token's id, where known.
            next_token_ids_T: The ids that follow each of them, where known.

        Returns:
            What `on_token` says of the last of them.
        """
        forecast = state.forecast
        for expert_map_LE, token_id, next_token_id in zip(
            expert_maps_TLE, token_ids_T, next_token_ids_T, strict=True
        ):
            forecast = self.on_token(
                state, expert_map_LE, token_id=token_id, next_token_id=next_token_id
            )
        return forecast

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> Tensor | None:
        """Say what these very tokens will use at layers l+1..l+H.

        Args:
            state: The request's past; may be updated in place.
            layer: The layer l that has just routed.
            router_input_TD: What its router received, T tokens of one request in a row.
            router_probs_TE: float32, its rows of the tokens' expert maps.

        Returns:
            float32 [T, H, E], on the inputs' device: the higher, the likelier it is used. A row is
            NaN where nothing is said, as beyond the last layer; None where all of it would be.
        """
        return None

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        """Use of one layer's experts after the token that it has just routed.

        Called for layers 0, 1, ... of a token in turn, before its `on_token`, and only where tokens
        come one at a time: a prompt's tokens are routed together.

        Args:
            state: The request's past; may be updated in place.
            layer: The layer.
            router_probs_E: float32, its row of the token's expert map.

        Returns:
            float32 [E] in the unit of ``forecast_LE - next_LE``, which stands in for None.
        """
        return None

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        """Everything that is said while ``trace`` is replayed, strictly causally.

        Override it only to say the same faster: a test compares.
        """
        spec = self.fitted_spec()
        state = self.new_state()
        forecasts = [self.on_request(state, Request.of(trace, with_truth=with_truth))]
        later_TLE = None
        if "routed" in self.moments:
            later_TLE = torch.zeros(trace.num_tokens, spec.num_layers, spec.num_experts)
        ids_P, first = trace.token_ids_P, trace.first_routed_position
        for t in range(trace.num_tokens):
            expert_map_LE = torch.from_numpy(trace.expert_map_LE(t, spec.num_experts))
            if later_TLE is not None:
                for layer, router_probs_E in enumerate(expert_map_LE):
                    later_E = self.on_routed(state, layer, router_probs_E)
                    assert later_E is not None, f"{self.kind!r} has 'routed' among its moments"
                    later_TLE[t, layer] = later_E
            if t == trace.num_tokens - 1:
                break
            forecasts.append(
                self.on_token(
                    state,
                    expert_map_LE,
                    token_id=None if ids_P is None else int(ids_P[first + t]),
                    next_token_id=None if ids_P is None else int(ids_P[first + t + 1]),
                )
            )
        return Walked(forecasts, later_TLE)

    def walk_layers(self, tokens: RoutedTokens) -> WalkedLayers:
        """Everything that is said while tokens are decoded one by one, layer by layer.

        Override it only to say the same faster: a test compares.

        Raises:
            ValueError: It does not speak at the layer moment, or needs inputs that are not there.
        """
        if "layer" not in self.moments:
            raise ValueError(f"predictor {self.kind!r} does not speak layer by layer")
        spec = self.fitted_spec()
        num_tokens = len(tokens.starts_N)
        ids, starts = tokens.token_ids_N.tolist(), tokens.starts_N.tolist()
        before_NLE = torch.full((num_tokens, spec.num_layers, spec.num_experts), torch.nan)
        ahead: dict[tuple[int, int], Tensor] = {}
        state = self.new_state()
        for n in range(num_tokens):
            if starts[n]:
                state = self.new_state()
                first_id_P = np.array(ids[n : n + 1], np.int32)
                forecast = self.on_request(state, Request(token_ids_P=first_id_P))
            if forecast is not None:
                before_NLE[n] = forecast.next_LE
            for layer in range(spec.num_layers):
                inputs_LND = tokens.router_input_LND
                input_TD = torch.empty(1, 0) if inputs_LND is None else inputs_LND[layer, n : n + 1]
                probs_TE = tokens.router_probs_LNE[layer, n : n + 1]
                if (said_THE := self.on_layer(state, layer, input_TD, probs_TE)) is not None:
                    ahead[layer, n] = said_THE[0]
            has_next = n + 1 < num_tokens and not starts[n + 1]
            forecast = self.on_token(
                state,
                tokens.router_probs_LNE[:, n].cpu(),
                token_id=ids[n],
                next_token_id=ids[n + 1] if has_next else None,
            )
        if not ahead:
            raise ValueError(f"predictor {self.kind!r} said nothing of any layer")
        some_HE = next(iter(ahead.values()))
        nothing_HE = torch.full_like(some_HE, torch.nan)
        ahead_LNHE = torch.stack(
            [
                torch.stack([ahead.get((layer, n), nothing_HE) for n in range(num_tokens)])
                for layer in range(spec.num_layers)
            ]
        )
        return WalkedLayers(before_NLE, ahead_LNHE)

    def graph_module(self, *, batch_size: int, kernels: bool = True) -> GraphPredictor | None:
        """The same forecasts as a program for a CUDA graph; None where there is none.

        Args:
            batch_size: B, the requests that are served at once; each has a past of its own.
            kernels: Use Triton kernels; False keeps to torch, which takes more launches and is for
                where there is no Triton.
        """
        return None

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values, without the embedder.

        Members stand in it as {"kind": ..., "config": ..., "embedder": ...}, by name.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Everything learned, as named tensors (empty where nothing is)."""

    @abstractmethod
    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`, on a predictor constructed with `config`."""

    def save_index(self, path: Path) -> None:  # noqa: B027 (most have none)
        """Write the FAISS index to ``path``; a predictor without one writes nothing."""

    def load_index(self, path: Path) -> None:
        """Inverse of `save_index`, called after `load_state` where a file was written.

        Raises:
            DamagedFileError: ``path`` is not the index that belongs to the loaded tensors.
        """
        raise ValueError(f"predictor {self.kind!r} has no index, but the artifact holds {path}")

    def fitted_spec(self) -> MoESpec:
        """The MoE it was fitted for; ValueError before `fit` or `load_state`."""
        if self.spec is None:
            raise ValueError(f"predictor {self.kind!r} is not fitted: call fit or load an artifact")
        return self.spec
