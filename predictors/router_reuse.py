"""Router reuse: layer l+h will choose what its own router chooses for layer l's router input.

Source: MoEpic §3.2. Nothing is learned; the routers are those of the model that is bound, run by
their own code (`data.routers`), so that biases and groups count as they do in the model.

Shape letters: T tokens · N tokens of several requests · L MoE layers · E experts per layer ·
D hidden · H layers ahead.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.adapters import spec_of
from data.errors import SpecMismatchError
from data.models import router_digest
from data.router_inputs import RoutedTokens
from data.routers import Routers
from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, State, WalkedLayers


@dataclass(slots=True)
class ReuseState(State):
    """One request's past.

    Attributes:
        last_input_D: The last layer's router input of the last token that passed it.
    """

    last_input_D: Tensor | None = None


class BoundModel:
    """The modules of a bound model that predictors read, and which checkpoint they belong to.

    Args:
        model: A transformers model.

    Attributes:
        model: The same.
        spec: Its MoE.
        routers: Its routers.
        digest_32: uint8, SHA-256 of its routers' weights.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.spec = spec_of(model)
        self.routers = Routers(model)
        self.digest_32 = torch.frombuffer(
            bytearray.fromhex(router_digest(model)), dtype=torch.uint8
        )

    def check(self, kind: str, spec: MoESpec | None, digest_32: Tensor | None) -> None:
        """Refuse a model that predictor ``kind`` was not fitted for; None is not fitted yet."""
        if spec is not None and (difference := spec.mismatch(self.spec)):
            raise SpecMismatchError(
                f"predictor {kind!r} was fitted for another model: {difference}"
            )
        if digest_32 is not None and not torch.equal(digest_32.cpu(), self.digest_32):
            raise SpecMismatchError(
                f"predictor {kind!r} was fitted for another checkpoint of {self.spec.describe()}: "
                f"its routers' digest is {_hex(digest_32)}, this model's {_hex(self.digest_32)}"
            )


def needed(bound: BoundModel | None, kind: str) -> BoundModel:
    """The bound model; ValueError where there is none yet."""
    if bound is None:
        raise ValueError(
            f"predictor {kind!r} runs the routers of the model itself: bind(model) comes first"
        )
    return bound


class RouterReuse(Predictor):
    """The routers of the next H layers, run on this layer's router input.

    After the last layer the next token's first H layers are forecast in the same way, as the paper
    does for the first layer; what it leaves open, the other layers, is said to repeat the finished
    token. Without router inputs (recorded traces) it says nothing there.

    Deviation from MoEpic: it looks one layer ahead; here it is H, each by its own router. What is
    said are the routers' probabilities, raised where their rule overrules them
    (`data.routers.Routers.scores_TE`).

    Args:
        lookahead: H, at least 1.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
    """

    kind: ClassVar[str] = "router_reuse"
    moments: ClassVar[frozenset[Moment]] = frozenset({"token", "layer"})
    needs_model: ClassVar[bool] = True

    def __init__(self, *, lookahead: int = 4, gamma: float = 0.95) -> None:
        super().__init__(gamma=gamma)
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead}: must be at least 1")
        self.lookahead = lookahead
        self._bound: BoundModel | None = None
        self._digest_32: Tensor | None = None

    def bind(self, model: nn.Module) -> None:
        """Take the model whose routers are run.

        Raises:
            NotAMoEError, ValueError: It has no routers, or none that can be run alone.
            SpecMismatchError: It is not the one that it was fitted for.
        """
        bound = BoundModel(model)
        bound.check(self.kind, self.spec, self._digest_32)
        self._bound = bound

    def fit(self, traces: TraceSet) -> FitReport:
        """Nothing to learn: note which model it is for.

        Raises:
            SpecMismatchError: The traces are of another model than the bound one.
        """
        start_s = time.perf_counter()
        bound = needed(self._bound, self.kind)
        if difference := traces.spec.mismatch(bound.spec):
            raise SpecMismatchError(
                f"predictor {self.kind!r} runs the routers of the traces' own model, and the one "
                f"at hand is another: {difference}. Name it with model=..."
            )
        self.fit_model()
        return FitReport(0, 0, time.perf_counter() - start_s)

    def fit_model(self) -> None:
        """The same, where there are no traces."""
        bound = needed(self._bound, self.kind)
        self.spec, self._digest_32 = bound.spec, bound.digest_32

    def new_state(self) -> ReuseState:
        """An empty past."""
        return ReuseState()

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> Tensor | None:
        """The next layers' routers on this layer's input."""
        assert isinstance(state, ReuseState)
        spec = self.fitted_spec()
        if layer == spec.num_layers - 1:
            state.last_input_D = router_input_TD[-1]
            return None
        return self._ahead_THE(layer + 1, router_input_TD)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """The first layers' routers on the finished token's last router input."""
        assert isinstance(state, ReuseState)
        state.num_tokens += 1
        if state.last_input_D is None:
            return None
        state.forecast = self._first(state.last_input_D[None], expert_map_LE[None])[0]
        return state.forecast

    def walk_layers(self, tokens: RoutedTokens) -> WalkedLayers:
        """All tokens at once, layer by layer."""
        spec = self.fitted_spec()
        if tokens.router_input_LND is None:
            raise ValueError(f"predictor {self.kind!r} needs router inputs, and there are none")
        num_tokens = len(tokens.starts_N)
        shape = (num_tokens, self.lookahead, spec.num_experts)
        nothing_NHE = torch.full(shape, torch.nan, device=tokens.router_probs_LNE.device)
        ahead = [
            self._ahead_THE(layer + 1, input_ND)
            for layer, input_ND in enumerate(tokens.router_input_LND[:-1])
        ]
        forecasts = self._first(
            tokens.router_input_LND[-1], tokens.router_probs_LNE.transpose(0, 1).cpu()
        )
        silent_LE = torch.full((spec.num_layers, spec.num_experts), torch.nan)
        before = [silent_LE, *(forecast.next_LE for forecast in forecasts[:-1])]
        before_NLE = torch.stack(before)
        before_NLE[tokens.starts_N.cpu()] = torch.nan
        return WalkedLayers(before_NLE, torch.stack([*ahead, nothing_NHE]))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"lookahead": self.lookahead, "gamma": self.gamma}

    def tensors(self) -> Mapping[str, Tensor]:
        """`router_digest_32`: which checkpoint's routers these are."""
        return {} if self._digest_32 is None else {"router_digest_32": self._digest_32}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; `bind` follows."""
        self.spec = spec
        self._digest_32 = tensors["router_digest_32"]

    def _ahead_THE(self, first_layer: int, input_TD: Tensor) -> Tensor:
        """float32 [T, H, E]: what the routers from ``first_layer`` on make of an input."""
        spec, routers = self.fitted_spec(), needed(self._bound, self.kind).routers
        said_THE = torch.full(
            (len(input_TD), self.lookahead, spec.num_experts), torch.nan, device=input_TD.device
        )
        for h, layer in enumerate(range(first_layer, spec.num_layers)[: self.lookahead]):
            said_THE[:, h] = routers.scores_TE(layer, input_TD).softmax(-1)
        return said_THE

    def _first(self, last_input_TD: Tensor, maps_TLE: Tensor) -> list[Forecast]:
        """One forecast of the next token from each token's last router input and map."""
        next_TLE = maps_TLE.clone()
        first_THE = self._ahead_THE(0, last_input_TD).cpu()[:, : next_TLE.shape[1]]
        next_TLE[:, : first_THE.shape[1]] = first_THE
        next_TLE = (self.fitted_spec().top_k * next_TLE).clamp_max(1.0)
        return [Forecast.stationary(next_LE, gamma=self.gamma) for next_LE in next_TLE]


def _hex(digest_32: Tensor) -> str:
    return bytes(digest_32.tolist()).hex()[:12]
