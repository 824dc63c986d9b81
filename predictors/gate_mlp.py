"""Gate MLP: what the routers of the coming layers will choose, learned from this layer's input.

It starts where `router_reuse` is and adds what a small network learns of what lies between: the
experts and the attention of the layers in between. Ours; ProMoE's per-layer predictors are the
nearest. Training is in `predictors.fit.gate_mlp`, the network in `predictors.gate_net` and
`predictors.gate_context`, what it reads in `predictors.gate_reader`.

Shape letters: U units (`gate_net`) · T tokens · N tokens of several requests · L MoE layers ·
E experts per layer · K experts per token · H layers ahead.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data.errors import SpecMismatchError
from data.router_inputs import LiveInputs, RoutedTokens, RouterInputs
from data.schema import MoESpec, TraceSet
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State, WalkedLayers
from predictors.calibrate import Calibration, fit_calibration
from predictors.gate_losses import LOSSES
from predictors.gate_net import EMBEDDING, GateNet, Units
from predictors.gate_reader import INPUTS, GateReader, GateState, TokenRow
from predictors.router_reuse import BoundModel, needed

Variant = Literal["residual", "independent"]


class GateMLP(Predictor):
    """A network per layer that corrects `router_reuse`, and one that knows the token's embedding.

    Layer l's unit reads, all known when layer l has routed: its router input and that of the layer
    before; its probabilities; what a small attention makes of the embeddings of this token and of
    those before it; what the previous token used in the target layers; and how far router reuse was
    off there for it. Before layer 0, all layers are forecast from scratch, by the embeddings and
    the previous token's map, so layer 0 is served, and recorded traces suffice for that moment.

    In a prompt's forward pass all tokens go through a layer together: what depends on the previous
    token's later layers is unknown there, and left at zero.

    Args:
        variant: "residual" adds to router reuse, one trunk for all targets of a layer;
            "independent" ranks from scratch with a network for each pair of layers (ProMoE's way).
        lookahead: H, at least 1.
        width: Of the networks' hidden layers.
        inputs: Which of `gate_reader.INPUTS` are read; token embeddings always are.
        context_tokens: Embeddings read: the token's own and those before it.
        loss: A name of `predictors.gate_losses.LOSSES`.
        steps: Training steps.
        max_seconds: Ends training earlier; None does not.
        batch_tokens: Tokens of a step, at most; a longer request is a step by itself.
        learning_rate: At its highest.
        averaging: Time constant of the moving average of the weights that is kept, as a share of
            the training; 0 keeps the weights themselves.
        seed: Of weights and order.
        gamma: Discount per token of `Forecast.forecast_LE`, in [0, 1).
        trainer: Keyword arguments of `lightning.Trainer`; where it is trained is no part of it.
    """

    kind: ClassVar[str] = "gate_mlp"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "token", "layer"})
    needs_model: ClassVar[bool] = True

    def __init__(
        self,
        *,
        variant: Variant = "residual",
        lookahead: int = 4,
        width: int = 256,
        inputs: Sequence[str] = INPUTS,
        context_tokens: int = 64,
        loss: str = "rank",
        steps: int = 1000,
        max_seconds: float | None = None,
        batch_tokens: int = 2048,
        learning_rate: float = 5e-3,
        averaging: float = 0.05,
        seed: int = 0,
        gamma: float = 0.95,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(gamma=gamma)
        if variant not in ("residual", "independent"):
            raise ValueError(f"variant={variant!r}: must be 'residual' or 'independent'")
        counts = {
            "lookahead": lookahead,
            "width": width,
            "context_tokens": context_tokens,
            "steps": steps,
            "batch_tokens": batch_tokens,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if unknown := sorted(set(inputs) - set(INPUTS)):
            raise ValueError(f"inputs={list(inputs)}: unknown {unknown}; there are {list(INPUTS)}")
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: must be one of {', '.join(LOSSES)}")
        if learning_rate <= 0:
            raise ValueError(f"learning_rate={learning_rate}: must be above 0")
        if not 0.0 <= averaging < 1.0:
            raise ValueError(f"averaging={averaging}: must be in [0, 1)")
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds={max_seconds}: must be above 0, or null")
        self.variant = variant
        self.lookahead = lookahead
        self.width = width
        self.inputs = tuple(name for name in INPUTS if name in inputs)
        self.context_tokens = context_tokens
        self.loss = loss
        self.steps = steps
        self.max_seconds = max_seconds
        self.batch_tokens = batch_tokens
        self.learning_rate = learning_rate
        self.averaging = averaging
        self.seed = seed
        self._trainer = trainer
        self._bound: BoundModel | None = None
        self._reader: GateReader | None = None
        self._net: GateNet | None = None
        self._made_units: Units | None = None
        self._digest_32: Tensor | None = None
        self._popularity_LE = torch.zeros(0, 0)
        self._calibration = Calibration.identity()

    def bind(self, model: nn.Module) -> None:
        """Take the model whose routers and embeddings are read; the network moves to its device.

        Raises:
            NotAMoEError, ValueError: It has no routers, or none that can be run alone.
            SpecMismatchError: It is not the one that it was fitted for.
        """
        bound = BoundModel(model)
        bound.check(self.kind, self.spec, self._digest_32)
        self._bound, self._reader = bound, None
        if self._net is not None:
            self._net.to(self._device)

    def fit(self, traces: TraceSet) -> FitReport:
        """Train while the bound model runs over the traces' tokens; calibrate on "val".

        Raises:
            SpecMismatchError: The traces are of another model than the bound one.
            ValueError: They have no token ids, or as `fit_inputs`.
        """
        start_s = time.perf_counter()
        bound = needed(self._bound, self.kind)
        report = self.fit_inputs(
            LiveInputs.of_traces(bound.model, traces, max_batch_tokens=self.batch_tokens)
        )
        self._calibration, details = fit_calibration(self, traces)
        report.fit_s = time.perf_counter() - start_s
        report.details |= details
        return report

    def fit_inputs(self, inputs: RouterInputs) -> FitReport:
        """Train on the requests of split "fit", keep what is best on those of split "val".

        Args:
            inputs: Router inputs of the bound model.

        Raises:
            SpecMismatchError: They are another model's.
            ValueError: A split is empty, an input is not finite, or there is nothing to learn.
        """
        # Lightning is a training machine's; serving must not import it.
        from predictors.fit.gate_mlp import fit_gate

        start_s = time.perf_counter()
        bound = needed(self._bound, self.kind)
        if difference := bound.spec.mismatch(inputs.spec):
            raise SpecMismatchError(
                f"router inputs are of another model than the bound one: {difference}"
            )
        self.spec, self._made_units, self._reader = bound.spec, None, None
        self._calibration = Calibration.identity()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._net = self._net_of(self._reading().input_sizes).to(self._device)
        fitted = fit_gate(
            self._net,
            self.read,
            self._units(),
            inputs,
            loss=self.loss,
            steps=self.steps,
            max_seconds=self.max_seconds,
            learning_rate=self.learning_rate,
            averaging=self.averaging,
            has_base=self.variant == "residual",
            seed=self.seed,
            trainer=self._trainer,
        )
        self._net.to(self._device)
        self._popularity_LE = fitted.use_LE.cpu()
        self._digest_32 = bound.digest_32
        return FitReport(
            fitted.num_requests, fitted.num_tokens, time.perf_counter() - start_s, fitted.details
        )

    @property
    def num_parameters(self) -> int:
        """Numbers learned."""
        return sum(parameter.numel() for parameter in self._network().parameters())

    def new_state(self) -> GateState:
        """An empty past."""
        return GateState()

    def on_request(self, state: State, request: Request) -> Forecast | None:
        """Forecast the first token from its own embedding; None if its id is not known."""
        assert isinstance(state, GateState)
        self._network()
        if request.token_ids_P is None:
            return None
        self._reading().begin(state, request.token_ids_P.tolist())
        return self._before(state)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        """Forecast all layers of the next token from its embedding; the last word if id unknown."""
        assert isinstance(state, GateState)
        self._reading().pass_token(state, expert_map_LE, token_id, next_token_id)
        return self._before(state)

    @torch.no_grad()
    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> Tensor | None:
        """The next layers' use by these tokens, from all that is known of them by now."""
        assert isinstance(state, GateState)
        net = self._network()
        read = self._reading().read_layer(state, layer, router_input_TD, router_probs_TE)
        if read is None:
            return None
        values, base_UTHE = read
        units, context_TD = self._units(), self._context(state, len(router_input_TD))
        scores_UTHE = net(context_TD, values, self._used_base(base_UTHE), units.slice_of(layer))
        return self._ahead(units, layer, scores_UTHE.softmax(-1))

    @torch.no_grad()
    def walk_layers(self, tokens: RoutedTokens) -> WalkedLayers:
        """All tokens and layers at once."""
        spec, net, units = self.fitted_spec(), self._network(), self._units()
        device = tokens.starts_N.device
        row, values, base_UNHE = self.read(tokens)
        said_UNHE = net(net.context(*row), values, base_UNHE).softmax(-1).to(device)
        num_tokens = len(tokens.starts_N)
        nothing_NHE = said_UNHE.new_full((num_tokens, self.lookahead, spec.num_experts), torch.nan)
        ahead = [
            self._ahead(units, layer, said_UNHE[units.slice_of(layer)])
            for layer in range(spec.num_layers - 1)
        ]
        before_NLE = self._all_layers(units, said_UNHE[units.slice_of(EMBEDDING)])
        before_NLE = self._calibration((spec.top_k * before_NLE).cpu())
        return WalkedLayers(before_NLE, torch.stack([*ahead, nothing_NHE]))

    def read(
        self, tokens: RoutedTokens, forgotten_N: Tensor | None = None
    ) -> tuple[TokenRow, dict[str, Tensor], Tensor]:
        """`GateReader.read`; the base [U, N, H, E] is 0 where the variant has none."""
        row, values, base_UNHE = self._reading().read(tokens, forgotten_N)
        return row, values, self._used_base(base_UNHE)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without where it is trained."""
        names = (
            "variant lookahead width context_tokens loss steps max_seconds batch_tokens "
            "learning_rate averaging seed gamma"
        )
        return {"inputs": list(self.inputs)} | {name: getattr(self, name) for name in names.split()}

    def tensors(self) -> Mapping[str, Tensor]:
        """Weights, popularity, calibration, and which checkpoint's routers these are."""
        if self._net is None or self._digest_32 is None:
            return {}
        weights = {f"net.{k}": v.detach().cpu() for k, v in self._net.state_dict().items()}
        return {
            **weights,
            "router_digest_32": self._digest_32,
            "popularity_LE": self._popularity_LE,
            **self._calibration.tensors(),
        }

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; `bind` follows."""
        self.spec = spec
        self._digest_32 = tensors["router_digest_32"]
        self._popularity_LE = tensors["popularity_LE"]
        self._calibration = Calibration.from_tensors(tensors)
        weights = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
        sizes = {
            name.removeprefix("read."): int(weight.shape[1])
            for name, weight in weights.items()
            if name.startswith("read.") and name != "read.context"
        }
        self._net = self._net_of(sizes)
        self._net.load_state_dict(weights)

    @property
    def _device(self) -> torch.device:
        device: torch.device = needed(self._bound, self.kind).model.device
        return device

    def _network(self) -> GateNet:
        self.fitted_spec()
        needed(self._bound, self.kind)
        assert self._net is not None
        return self._net

    def _units(self) -> Units:
        if self._made_units is None:
            self._made_units = Units.of(
                num_layers=self.fitted_spec().num_layers,
                lookahead=self.lookahead,
                shared=self.variant == "residual",
            )
        return self._made_units

    def _reading(self) -> GateReader:
        if self._reader is None:
            bound = needed(self._bound, self.kind)
            self._reader = GateReader(
                model=bound.model,
                routers=bound.routers,
                spec=bound.spec,
                units=self._units(),
                inputs=self.inputs,
                context_tokens=self.context_tokens,
            )
        return self._reader

    def _net_of(self, input_sizes: Mapping[str, int]) -> GateNet:
        units, hidden_size = self._units(), self.fitted_spec().hidden_size
        assert hidden_size is not None, "a model that can be bound has router inputs of some size"
        return GateNet(
            num_units=len(units.sources),
            num_targets=units.most_targets,
            num_experts=self.fitted_spec().num_experts,
            hidden_size=hidden_size,
            input_sizes=input_sizes,
            width=self.width,
            window=self.context_tokens,
        )

    def _used_base(self, base_UNHE: Tensor) -> Tensor:
        return base_UNHE if self.variant == "residual" else torch.zeros_like(base_UNHE)

    def _context(self, state: GateState, num_tokens: int) -> Tensor:
        """Of the tokens that come next; computed once a forward pass."""
        if state.context_TD is None or len(state.context_TD) != num_tokens:
            row = self._reading().around(state, num_tokens)
            state.context_TD = self._network().context(*row)[-num_tokens:]
        return state.context_TD

    @torch.no_grad()
    def _before(self, state: GateState) -> Forecast | None:
        """The forecast of the token that is known to come next."""
        if not state.coming_ids:
            return state.forecast
        net, units = self._network(), self._units()
        values, base_U1HE = self._reading().read_token(state)
        part, context_1D = units.slice_of(EMBEDDING), self._context(state, 1)
        said_U1HE = net(context_1D, values, base_U1HE, part).softmax(-1)
        next_LE = self._all_layers(units, said_U1HE)[0]
        next_LE = self._calibration((self.fitted_spec().top_k * next_LE).cpu())
        later_LE = self._popularity_LE * (self.gamma / (1.0 - self.gamma))
        state.forecast = Forecast(next_LE, next_LE + later_LE)
        return state.forecast

    def _all_layers(self, units: Units, said_UNHE: Tensor) -> Tensor:
        """[N, L, E] from the units of the embedding."""
        part = units.slice_of(EMBEDDING)
        parts = zip(said_UNHE, units.targets[part], strict=True)
        return torch.cat([said_NHE[:, : len(targets)] for said_NHE, targets in parts], dim=1)

    def _ahead(self, units: Units, layer: int, said_UNHE: Tensor) -> Tensor:
        """[N, lookahead, E] from the units of a layer, NaN beyond the last layer."""
        parts = zip(said_UNHE, units.targets[units.slice_of(layer)], strict=True)
        said_NHE = torch.cat([part[:, : len(targets)] for part, targets in parts], dim=1)
        shape = (said_NHE.shape[0], self.lookahead - said_NHE.shape[1], said_NHE.shape[2])
        return torch.cat([said_NHE, said_NHE.new_full(shape, torch.nan)], dim=1)
