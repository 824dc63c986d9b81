"""Serving a model with only some of its experts in memory, token for token as if all were.

`attach` moves a loaded model's routed experts to a slower tier (a store on disk, or on a GPU pinned
host memory), gives some of the memory back to slots, and registers one function in transformers'
``ALL_EXPERTS_FUNCTIONS``: no model is forked, so every family that routes through that interface
works. Each call of that function is one event of the cache: every expert that these tokens need in
this layer is found, loaded or read in place. `Offload.detach` puts everything back, to the bit.

The engine only connects: what to keep is decided by the cache and its policy (the same objects as
in the simulator), bytes are moved and experts computed by a `Backend`, forecasts come from a
`ServedPredictor` (through an `Observer` on a CPU; on a GPU within captured steps, or on a thread of
the host), which can be swapped. One forward pass at a time; no gradient flows through it.

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

from data.adapters import MoELayer, moe_layers, spec_of
from data.schema import MoESpec
from predictors.base import Predictor
from runtime.attach_checks import (
    NAME_PREFIX,
    check_foresight,
    check_gpu_options,
    check_mode,
    check_model,
    check_scores,
    check_spec,
    slots_per_layer,
)
from runtime.backend import Backend, CpuBackend, OffloadStats
from runtime.cache import Event
from runtime.compiled_layers import CompiledLayers, not_compiled
from runtime.decode_graph import DecodeGraph, recorder_for
from runtime.expert_view import ExpertView
from runtime.gpu_memory import context_of
from runtime.graph_forecasts import device_bytes
from runtime.observer import Observer, PassRow
from runtime.policies import make_policy
from runtime.policies.base import Policy
from runtime.prefill_chunks import chunked_prefill
from runtime.prompt_trial import check_prompt_fits
from runtime.resident_routing import ResidentRouting, most_wanted
from runtime.served_predictor import ServedPredictor
from runtime.sizes import parse_bytes

logger = logging.getLogger(__name__)


class Offload:
    """A model that serves with offloaded experts until `detach`; `attach` makes one.

    A context manager: leaving it detaches.

    Attributes:
        spec: The model's MoE.
        slots: C of each MoE layer.
        context_tokens: Positions of a sequence that memory on a GPU was planned for; None where
            nothing was planned, and a longer one takes what it takes.
    """

    def __init__(
        self,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: tuple[int, ...],
        backend: Backend,
        context_tokens: int | None = None,
    ) -> None:
        self.spec = spec
        self.slots = slots
        self.context_tokens = context_tokens
        self._backend = backend
        self._layer_of = {moe.experts: moe.layer for moe in layers}
        self._predictor: ServedPredictor | None = None
        self._graph: DecodeGraph | None = None
        self._restricted: ResidentRouting | None = None
        self._undo = ExitStack()
        self._attached = True
        self._name = f"{NAME_PREFIX}{id(self):x}"
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
        if self._predictor is not None:
            stats = self._predictor.add_to(stats)
        if self._restricted is not None:
            stats = self._restricted.add_to(stats)
        return stats if self._graph is None else self._graph.add_to(stats)

    def view(self, *, goes_on: bool = True) -> ExpertView:
        """As `Backend.view`."""
        return self._backend.view(goes_on=goes_on)

    def begin_request(self, *prompts: str) -> None:
        """Say that the next forward pass begins new requests, and what their prompts are.

        Needed only by predictors that read the text: a request begins by itself wherever the KV
        cache is empty. Without a predictor it does nothing.

        Args:
            prompts: One text per row of the batch, or none if the texts are not known.
        """
        if self._predictor is not None:
            self._predictor.observer.begin_request(*prompts)

    @property
    def follows_batches(self) -> bool:
        """Whether forecasts are right for several sequences in a pass: on a CPU, or without any."""
        return self._predictor is None or isinstance(self._predictor.observer, Observer)

    def announce(self, rows: Sequence[PassRow]) -> None:
        """Say whose tokens the next pass computes; otherwise those of the rows of its input."""
        if (observer := self._row_observer()) is not None:
            observer.announce(rows)
        elif rows[0].position == 0:
            self.begin_request(rows[0].prompt or "")

    def expected_use(self, row: PassRow) -> Tensor | None:
        """Probability that a sequence's next token uses each expert, float32 [L, E], or None."""
        observer = self._row_observer()
        if observer is None or (forecast := observer.foresee(row)) is None:
            return None
        return forecast.next_LE

    def captured_cache(self, max_tokens: int) -> Any:
        """A KV cache over which decode steps are captured; None where none are."""
        if not self.captures_steps:
            return None
        assert self._graph is not None
        return self._graph.new_cache(max_tokens, context_tokens=self.context_tokens)

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured, for a server that asks for a `captured_cache`."""
        return self._graph is not None and self._row_observer() is None  # a replay runs no hooks

    def end_request(self, key: str, *, remember: bool = True) -> None:
        """Say that an announced sequence is over, and whether it counts as a finished request."""
        if (observer := self._row_observer()) is not None:
            observer.end_request(key, remember=remember)

    def keep_resident(self, scores_LE: Tensor) -> None:
        """Make other experts resident, between requests, where the mode is "resident_only".

        Args:
            scores_LE: float, such as expected uses: of each layer those that score highest are
                kept, as many as it has slots; of equals the first.

        Raises:
            ValueError: The mode is another, or there is not one number per expert.
        """
        if self._restricted is None:
            raise ValueError("mode='lossless': its policy decides what is resident")
        check_scores(scores_LE, self.spec)
        resident_LE = most_wanted(scores_LE, self.slots)
        assert isinstance(self._backend, CpuBackend)
        self._backend.make_resident(resident_LE)
        self._restricted.allow(resident_LE)

    def swap_predictor(self, predictor: Predictor) -> None:
        """Let another predictor forecast from the next pass on, by the policy given at `attach`.

        Both are held for a moment, so whatever is raised leaves the old one as it was.

        Raises:
            SpecMismatchError: It was fitted for another model.
            ValueError: No predictor is served, or this one cannot be.
        """
        before = self._predictor
        if before is None:
            raise ValueError("no predictor is served: the policy reads no forecasts")
        check_spec(predictor, self.spec)
        predictor.bind(self._model)
        self._observe(self._model, self._layers, predictor)
        if self._graph is not None:
            self._graph.forget()  # before its steps' memory goes with the old one
        before.remove()

    def _row_observer(self) -> Observer | None:
        """Who can tell the sequences of a pass apart, if anybody watches in that way."""
        observer = None if self._predictor is None else self._predictor.observer
        return observer if isinstance(observer, Observer) else None

    def detach(self) -> None:
        """Give the model back as it was, to the bit; a second call does nothing.

        Raises:
            RuntimeError: The device has failed so badly that experts which live on it cannot be
                brought back; the model must be loaded again. Whatever else can be undone, is.
        """
        if not self._attached:
            return
        self._attached = False
        if self._predictor is not None:
            self._predictor.remove()
        if self._graph is not None:
            self._graph.remove()
        for config, implementation in self._implementations:
            config._experts_implementation = {"": implementation}
        ALL_EXPERTS_FUNCTIONS.pop(self._name, None)
        if self._restricted is not None:
            self._restricted.remove()
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

    def _restrict(self, layers: Sequence[MoELayer], scores_LE: Tensor) -> None:
        self._restricted = ResidentRouting(layers=layers, spec=self.spec)
        self.keep_resident(scores_LE)
        logger.warning("Mode resident_only: tokens whose experts are absent get others; LOSSY")

    def _cut_prompts(self, model: nn.Module, chunk_tokens: int) -> None:
        """Let ``model.generate`` compute prompts in chunks, which memory was planned for."""
        self._undo.enter_context(chunked_prefill(model, chunk_tokens))

    def _capture_decoding(
        self, model: nn.Module, *, max_batch: int, compiled: CompiledLayers | None = None
    ) -> None:
        def hold() -> str | None:
            return None if self._predictor is None else self._predictor.why_not_captured()

        self._graph = DecodeGraph(
            model,
            recorder=recorder_for(model),
            max_batch=max_batch,
            compiled=compiled,
            hold=hold,
        )

    def _try_prompt(self, model: nn.Module, tokens: int, planned_bytes: int | None) -> None:
        """See that memory holds a prompt, and forget it."""
        check_prompt_fits(
            model,
            tokens,
            slots=self.slots,
            planned_bytes=planned_bytes,
            context_tokens=self.context_tokens,
        )
        self._backend.reset()

    def _observe(self, model: nn.Module, layers: Sequence[MoELayer], predictor: Predictor) -> None:
        self._model, self._layers = model, layers

        def capture_anew() -> None:
            if self._graph is not None:
                self._graph.forget()

        self._predictor = ServedPredictor(
            model=model,
            layers=layers,
            backend=self._backend,
            predictor=predictor,
            on_change=capture_anew,
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
        if self._predictor is not None:
            self._predictor.routed(layer, top_k_index, top_k_weights)
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
    trial_tokens: int | None = None,
    context_tokens: int | None = None,
    mode: Literal["lossless", "resident_only"] = "lossless",
    resident_scores_LE: Tensor | None = None,
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
            GPU that of everything: other weights, KV cache, activations, workspace, what a
            predictor takes there, and slots.
        predictor: A fitted predictor for this model; what policies that read forecasts read. On a
            GPU it runs inside the graph if it can (`Predictor.graph_module`), or else on a thread
            that no forward pass waits for. If it fails it is switched off, and policy "lfru" goes
            on; `OffloadStats` says so.
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
        trial_tokens: Only for a GPU: serve a prompt of so many tokens, beside a KV cache of the
            whole context, before anything else, so that what does not fit fails now; 0 = do not. By
            default one chunk where ``budget_bytes`` is given: no prompt takes more memory.
        context_tokens: Only for a GPU: prompt and answer of the one sequence whose KV cache
            ``budget_bytes`` shall hold; by default `runtime.gpu_memory.CONTEXT_TOKENS`, or what the
            model has. A server must not admit longer ones (`Offload.context_tokens`).
        mode: "resident_only" is LOSSY: tokens are routed to the best experts that are resident, and
            nothing is loaded but by `Offload.keep_resident` (`runtime.resident_routing`). Only for
            the CPU; the policy then has nothing to decide.
        resident_scores_LE: For that mode, who is resident at first; see `Offload.keep_resident`.

    Raises:
        NotAMoEError: The model is dense, or its family bypasses transformers' ExpertsInterface.
        SpecMismatchError: The predictor was fitted for another model.
        ValueError: Slots, budget, policy or device cannot work, or the model is attached already.
    """
    layers = moe_layers(model)
    spec = spec_of(model)
    target = check_model(model, layers, device)
    policy = make_policy(policy) if isinstance(policy, str) else policy
    check_foresight(policy, predictor)
    if predictor is not None:
        check_spec(predictor, spec)
    check_mode(mode, device=target, spec=spec, predictor=predictor, scores_LE=resident_scores_LE)
    generates = getattr(model, "generation_config", None) is not None
    if target.type == "cpu":
        if compile_layers:
            raise ValueError("compile_layers=True: only for a GPU, leave it out on a CPU")
        if cpu_lane is True:
            raise ValueError("cpu_lane=True: experts are served by the CPU anyway; leave it out")
        if trial_tokens:
            raise ValueError(f"trial_tokens={trial_tokens}: prompts are tried on a GPU only")
        if context_tokens is not None:
            raise ValueError(f"context_tokens={context_tokens}: memory is planned on a GPU only")
        num_slots = slots_per_layer(spec, slots, budget_bytes)
        if predictor is not None:
            predictor.bind(model)
        backend: Backend = CpuBackend.build(
            layers=layers,
            spec=spec,
            slots=num_slots,
            policy=policy,
            store_dir=store_dir,
            record_events=record_events,
        )
        planned_bytes = None
    else:
        check_gpu_options(target, store_dir=store_dir, record_events=record_events)
        from runtime.gpu_experts import GpuExperts  # its kernels need triton
        from runtime.gpu_memory import CHUNK_TOKENS, allocated_bytes, gpu_slots_for_bytes

        planned_bytes = None
        if context_tokens is not None or (budget_bytes is not None and slots is None):
            context_tokens = context_of(model, context_tokens)
        if budget_bytes is not None and slots is None:
            assert context_tokens is not None
            budget = parse_bytes(budget_bytes)
            forecast_bytes = 0
            if predictor is not None and policy.foresight == "forecast":
                forecast_bytes = device_bytes(predictor)
            slots = gpu_slots_for_bytes(
                model,
                layers,
                spec,
                budget,
                device=target,
                predictor_bytes=forecast_bytes,
                context_tokens=context_tokens,
            )
            planned_bytes = budget - forecast_bytes + allocated_bytes(model, target)
            if trial_tokens is None:
                trial_tokens = min(CHUNK_TOKENS, context_tokens - 1)
            budget_bytes = None
        num_slots = slots_per_layer(spec, slots, budget_bytes)
        backend = GpuExperts.build(
            model=model,
            layers=layers,
            spec=spec,
            slots=num_slots,
            policy=policy,
            device=target,
            cpu_lane=cpu_lane,
        )
    offload = Offload(
        layers=layers, spec=spec, slots=num_slots, backend=backend, context_tokens=context_tokens
    )
    try:
        offload._install()
        if resident_scores_LE is not None:
            offload._restrict(layers, resident_scores_LE)
        if target.type == "cuda" and generates:
            offload._cut_prompts(model, CHUNK_TOKENS)
        if backend.max_graph_tokens is not None and generates:
            compiled = CompiledLayers(model) if compile_layers else None
            offload._capture_decoding(model, max_batch=backend.max_graph_tokens, compiled=compiled)
        if trial_tokens and generates:
            offload._try_prompt(model, trial_tokens, planned_bytes)
        if predictor is not None and target.type == "cuda":
            predictor.bind(model)  # now that it is where it runs
        if predictor is not None and policy.foresight == "forecast":
            offload._observe(model, layers, predictor)
    except BaseException:
        offload.detach()
        raise
    logger.info(
        "Attached %s on %s: %s slots per layer, policy %s",
        spec.describe(),
        target,
        sorted(set(num_slots)),
        policy.name,
    )
    return offload
