"""Serving a model with only some of its experts in memory, token for token as if all were.

`attach` moves a loaded model's routed experts to a slower tier (a store on disk, or on a GPU pinned
host memory), gives some of the memory back to slots, and registers one function in transformers'
``ALL_EXPERTS_FUNCTIONS``: no model is forked, so every family that routes through that interface
works. Each call of that function is one event of the cache: every expert that these tokens need in
this layer is found, loaded or read in place. `Offload.detach` puts everything back, to the bit.

The engine only connects: what to keep is decided by the cache and its policy (the same objects as
in the simulator), bytes are moved and experts computed by a `Backend`, forecasts come from a
predictor through an `Observer`. One forward pass at a time; no gradient flows through it.

Shape letters: T tokens · E experts per layer · K experts per token · D hidden · C slots.
"""

import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from data.adapters import MoELayer, expert_parameters, moe_layers, spec_of
from data.errors import SpecMismatchError
from data.schema import MoESpec
from predictors.base import Forecast, Predictor
from runtime.backend import Backend, CpuBackend, OffloadStats
from runtime.budget import check_slots, slots_for_bytes
from runtime.cache import Event
from runtime.compiled_layers import CompiledLayers, not_compiled
from runtime.decode_graph import DecodeGraph, recorder_for
from runtime.observer import Observer
from runtime.policies import make_policy
from runtime.policies.base import Policy, later_use
from runtime.prefill_chunks import chunked_prefill
from runtime.sizes import parse_bytes

logger = logging.getLogger(__name__)

_NAME_PREFIX = "moecast-"  # of the names under which models' expert functions are registered


class Offload:
    """A model that serves with offloaded experts until `detach`; `attach` makes one.

    A context manager: leaving it detaches.

    Attributes:
        spec: The model's MoE.
        slots: C of each MoE layer.
    """

    def __init__(
        self,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: tuple[int, ...],
        backend: Backend,
    ) -> None:
        self.spec = spec
        self.slots = slots
        self._backend = backend
        self._layer_of = {moe.experts: moe.layer for moe in layers}
        self._observer: Observer | None = None
        self._graph: DecodeGraph | None = None
        self._undo = ExitStack()
        self._attached = True
        self._name = f"{_NAME_PREFIX}{id(self):x}"
        configs: dict[int, Any] = {id(moe.experts.config): moe.experts.config for moe in layers}
        self._implementations: list[tuple[Any, str | None]] = [
            (config, config._experts_implementation) for config in configs.values()
        ]

    @property
    def events(self) -> list[Event]:
        """The cache's log; empty unless attached with ``record_events=True``."""
        return self._backend.events

    def stats(self) -> OffloadStats:
        """The counters as they are now; readable after `detach`, too."""
        stats = self._backend.stats()
        return stats if self._graph is None else self._graph.add_to(stats)

    def begin_request(self, *prompts: str) -> None:
        """Say that the next forward pass begins new requests, and what their prompts are.

        Needed only by predictors that read the text: a request begins by itself wherever the KV
        cache is empty. Without a predictor it does nothing.

        Args:
            prompts: One text per row of the batch, or none if the texts are not known.
        """
        if self._observer is not None:
            self._observer.begin_request(*prompts)

    def detach(self) -> None:
        """Give the model back as it was, to the bit; a second call does nothing.

        Raises:
            RuntimeError: The device has failed so badly that experts which live on it cannot be
                brought back; the model must be loaded again. Whatever else can be undone, is.
        """
        if not self._attached:
            return
        self._attached = False
        if self._observer is not None:
            self._observer.remove()
        if self._graph is not None:
            self._graph.remove()
        for config, implementation in self._implementations:
            config._experts_implementation = {"": implementation}
        ALL_EXPERTS_FUNCTIONS.pop(self._name, None)
        self._undo.close()
        self._backend.restore()
        logger.info("Detached: %s", self.stats())

    def __enter__(self) -> Self:
        """The object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detach, whatever happened inside."""
        self.detach()

    def _install(self) -> None:
        """Route the model's experts here; nothing in it can fail half-way."""
        ALL_EXPERTS_FUNCTIONS[self._name] = not_compiled(self._experts_forward)
        for config, _ in self._implementations:
            # As a mapping, it sets this config alone and leaves its subconfigs as they are.
            config._experts_implementation = {"": self._name}

    def _cut_prompts(self, model: nn.Module, chunk_tokens: int) -> None:
        """Let ``model.generate`` compute prompts in chunks, which memory was planned for."""
        self._undo.enter_context(chunked_prefill(model, chunk_tokens))

    def _capture_decoding(
        self, model: nn.Module, *, max_batch: int, compiled: CompiledLayers | None = None
    ) -> None:
        self._graph = DecodeGraph(
            model, recorder=recorder_for(model), max_batch=max_batch, compiled=compiled
        )

    def _observe(self, model: nn.Module, layers: Sequence[MoELayer], predictor: Predictor) -> None:
        def keep(forecast: Forecast) -> None:
            self._backend.expect(later_use(forecast))

        def keep_layer(layer: int, later_E: Tensor) -> None:
            self._backend.expect(later_E, layer)

        self._observer = Observer(
            model=model,
            layers=layers,
            predictor=predictor,
            on_forecast=keep,
            on_later=keep_layer,
        )

    @torch.no_grad()
    def _experts_forward(
        self,
        experts: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """The function that transformers calls in place of an experts module's own forward.

        Arguments are named as in transformers' own implementations: T tokens' hidden states
        [T, D], expert ids [T, K] and weights [T, K].
        """
        layer = self._layer_of.get(experts)
        if layer is None:
            return self._stock_forward(experts, hidden_states, top_k_index, top_k_weights)
        return self._backend.forward(layer, hidden_states, top_k_index, top_k_weights)

    def _stock_forward(self, experts: nn.Module, *arguments: Tensor) -> Tensor:
        """For modules of another model that was built on the very same config object."""
        (implementation,) = [
            implementation
            for config, implementation in self._implementations
            if config is experts.config
        ]
        stock = ALL_EXPERTS_FUNCTIONS.get_interface(
            implementation, inspect.unwrap(type(experts).forward)
        )
        output: Tensor = stock(experts, *arguments)
        return output


def attach(
    model: nn.Module,
    *,
    policy: str | Policy = "lru",
    slots: int | Sequence[int] | None = None,
    budget_bytes: int | str | None = None,
    predictor: Predictor | None = None,
    device: torch.device | str | None = None,
    store_dir: Path | str | None = None,
    record_events: bool = False,
    compile_layers: bool = False,
    cpu_lane: bool | Literal["auto"] = False,
) -> Offload:
    """Serve ``model`` with only some of its experts in memory; its outputs stay the same.

    On a CPU the experts are first written to a store (unless ``store_dir`` holds it already); until
    that is complete the model is untouched, and no second copy of them is held in memory.

    On a GPU they move to pinned host memory, layer by layer, and everything else of the model to
    the GPU; ``model.generate`` reads prompts in chunks, which is what memory is planned for, and
    its decode steps are captured in a graph (`runtime.decode_graph`). What fails half-way is
    undone.

    Args:
        model: A transformers model in float32, bfloat16 or float16, all of it on one device.
        policy: What to keep: a name of `runtime.policies.POLICIES`, or a policy.
        slots: Resident experts per MoE layer: one number, or one per layer.
        budget_bytes: Instead of ``slots``: memory such as "12GiB". On a CPU that of all slots; on a
            GPU that of everything: other weights, KV cache, activations, workspace and slots.
        predictor: A fitted predictor for this model; what policies that read forecasts read.
        device: Where to serve; by default where the model is. "cuda" takes a model that is on the
            CPU to the GPU until `Offload.detach`.
        store_dir: Where stores live, to be found again by the next run. By default a temporary
            folder, removed by `Offload.detach`. It takes the experts' size, so let it be on a disk.
            Only for the CPU.
        record_events: Keep the cache's log of every hit, miss, eviction and streamed read. Only for
            the CPU: reading it would make every step of a GPU wait for the host.
        compile_layers: Compile what lies between the experts for decoding (`CompiledLayers`): a
            quarter less time a token where all experts are resident, for some seconds before the
            first one. Logits differ from the model's by rounding. Only for a GPU.
        cpu_lane: On a GPU, let processor cores compute a part of what a decode step misses while
            the link carries the rest; they spin while decoding. "auto" takes it where it wins.
            Outputs are then exact to rounding, but no longer the same bits at every residency.

    Raises:
        NotAMoEError: The model is dense, or its family bypasses transformers' ExpertsInterface.
        SpecMismatchError: The predictor was fitted for another model.
        ValueError: Slots, budget, policy or device cannot work, or the model is attached already.
    """
    layers = moe_layers(model)
    spec = spec_of(model)
    target = _check_model(model, layers, device)
    policy = make_policy(policy) if isinstance(policy, str) else policy
    _check_foresight(policy, predictor)
    if predictor is not None:
        _check_spec(predictor, spec)
    backend: Backend
    if target.type == "cpu":
        if compile_layers:
            raise ValueError("compile_layers=True: only for a GPU, leave it out on a CPU")
        if cpu_lane is True:
            raise ValueError("cpu_lane=True: experts are served by the CPU anyway; leave it out")
        num_slots = _slots_per_layer(spec, slots, budget_bytes)
        if predictor is not None:
            predictor.bind(model)
        backend = CpuBackend.build(
            layers=layers,
            spec=spec,
            slots=num_slots,
            policy=policy,
            store_dir=store_dir,
            record_events=record_events,
        )
    else:
        from runtime.gpu_experts import GpuExperts  # its kernels need triton
        from runtime.gpu_memory import CHUNK_TOKENS, gpu_slots_for_bytes

        if predictor is not None or store_dir is not None or record_events:
            raise ValueError(
                f"predictor={predictor and predictor.kind}, store_dir={store_dir}, "
                f"record_events={record_events}: not yet supported on {target}; leave them out"
            )
        if budget_bytes is not None and slots is None:
            budget = parse_bytes(budget_bytes)
            slots = gpu_slots_for_bytes(model, layers, spec, budget, device=target)
            budget_bytes = None
        num_slots = _slots_per_layer(spec, slots, budget_bytes)
        backend = GpuExperts.build(
            model=model,
            layers=layers,
            spec=spec,
            slots=num_slots,
            policy=policy,
            device=target,
            cpu_lane=cpu_lane,
        )
    offload = Offload(layers=layers, spec=spec, slots=num_slots, backend=backend)
    if predictor is not None and policy.foresight == "forecast":
        offload._observe(model, layers, predictor)
    offload._install()
    generates = getattr(model, "generation_config", None) is not None
    if target.type == "cuda" and generates:
        offload._cut_prompts(model, CHUNK_TOKENS)
    if backend.max_graph_tokens is not None and generates:
        compiled = CompiledLayers(model) if compile_layers else None
        offload._capture_decoding(model, max_batch=backend.max_graph_tokens, compiled=compiled)
    logger.info(
        "Attached %s on %s: %s slots per layer, policy %s",
        spec.describe(),
        target,
        sorted(set(num_slots)),
        policy.name,
    )
    return offload


def _check_model(
    model: nn.Module, layers: Sequence[MoELayer], device: torch.device | str | None
) -> torch.device:
    """Where to serve; ValueError if the model is attached already or lies where it cannot be."""
    homes = {parameter.device for parameter in model.parameters()}
    for moe in layers:
        config: Any = moe.experts.config
        if str(config._experts_implementation).startswith(_NAME_PREFIX):
            raise ValueError(
                "the model, or one on the same config object, is attached already: detach it first"
            )
        for name, parameter in expert_parameters(moe.experts):
            if parameter.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"{name} of layer {moe.layer} is on {parameter.device}: experts are served "
                    "from the CPU or a CUDA device; load the model on one of them"
                )
    if len(homes) > 1:
        raise ValueError(f"the model is on {sorted(map(str, homes))}: load it on one device")
    home = homes.pop()
    target = home if device is None else torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: there is no CUDA device that torch can use")
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    if target.type not in ("cpu", "cuda") or (home.type == "cuda" and target != home):
        raise ValueError(
            f"device={device} with a model on {home}: it can be served where it is, or from the "
            "CPU on a CUDA device"
        )
    return target


def _slots_per_layer(
    spec: MoESpec, slots: int | Sequence[int] | None, budget_bytes: int | str | None
) -> tuple[int, ...]:
    """C of each layer, as told or as the budget pays for."""
    if (slots is None) == (budget_bytes is None):
        raise ValueError(
            f"slots={slots} and budget_bytes={budget_bytes}: give exactly one of them; "
            f"{spec.describe()} can have {spec.top_k}..{spec.num_experts} slots per layer"
        )
    if budget_bytes is not None:
        slots = slots_for_bytes(parse_bytes(budget_bytes), spec)
    given = (slots,) * spec.num_layers if isinstance(slots, int) else tuple(slots or ())
    if len(given) != spec.num_layers:
        raise ValueError(
            f"slots has {len(given)} entries: {spec.describe()} needs one number, or one per layer"
        )
    for num_slots in given:
        check_slots(num_slots, spec)
    return given


def _check_foresight(policy: Policy, predictor: Predictor | None) -> None:
    if policy.foresight == "truth":
        raise ValueError(
            f"policy {policy.name!r} needs to know the future: only the simulator can run it"
        )
    if policy.foresight == "forecast" and predictor is None:
        raise ValueError(f"policy {policy.name!r} reads forecasts: give a predictor")
    if policy.foresight == "none" and predictor is not None:
        logger.warning(
            "Policy %s reads no forecasts: predictor %s is not run", policy.name, predictor.kind
        )


def _check_spec(predictor: Predictor, spec: MoESpec) -> None:
    if predictor.spec is None:
        raise ValueError(f"predictor {predictor.kind!r} is not fitted: fit or load it first")
    if difference := predictor.spec.mismatch(spec):
        raise SpecMismatchError(
            f"predictor {predictor.kind!r} was fitted for another model: {difference}"
        )
