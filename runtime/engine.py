"""Serving a model with only some of its experts in memory, token for token as if all were.

`attach` moves a loaded model's routed experts to a store on disk, gives some of the memory back to
slots, and registers one function in transformers' ``ALL_EXPERTS_FUNCTIONS``: no model is forked, so
every family that routes through that interface works. Each call of that function is one event of
the cache: every expert that these tokens need in this layer is found, loaded or read in place.
`Offload.detach` puts everything back, to the bit.

The engine only connects: what to keep is decided by the cache and its policy (the same objects as
in the simulator), bytes are moved and experts computed by an `ExpertExecutor`, forecasts come from
a predictor through an `Observer`. One forward pass at a time; no gradient flows through it.

Shape letters: T tokens · L MoE layers · K experts per token · D hidden · C slots.
"""

import inspect
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from data.adapters import MoELayer, expert_parameters, moe_layers, spec_of
from data.errors import SpecMismatchError
from data.schema import MoESpec
from predictors.base import Forecast, Predictor
from runtime.budget import check_slots, slots_for_bytes
from runtime.cache import Event, ExpertCache
from runtime.experts import CpuExecutor, ExpertExecutor, used_experts
from runtime.host_store import HostStore, open_store, release_experts, restore_experts
from runtime.metrics import Counters
from runtime.observer import Observer
from runtime.policies import make_policy
from runtime.policies.base import Policy, later_use
from runtime.sizes import parse_bytes

logger = logging.getLogger(__name__)

_NAME_PREFIX = "moecast-"  # of the names under which models' expert functions are registered


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadStats:
    """What serving has cost since `attach`; `runtime.metrics.Counters` says what is counted.

    Attributes:
        hits: Accesses that found their expert in a slot.
        misses: Accesses that did not: demand loads and streamed ones.
        streamed: Misses without room, read in place.
        evictions: Experts that gave up their slot.
        miss_bytes: Bytes of all misses.
        stall_s: Seconds spent on demand loads (reading in place is part of computing).
    """

    hits: int
    misses: int
    streamed: int
    evictions: int
    miss_bytes: int
    stall_s: float

    @property
    def hit_ratio(self) -> float:
        """Hits among all accesses; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


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
        cache: ExpertCache,
        store: HostStore,
        executor: ExpertExecutor,
        folder: tempfile.TemporaryDirectory[str] | None,
    ) -> None:
        self.spec = spec
        self.slots = slots
        self._layers = layers
        self._layer_of = {moe.experts: moe.layer for moe in layers}
        self._cache = cache
        self._store: HostStore | None = store
        self._executor: ExpertExecutor | None = executor
        self._folder = folder
        self._observer: Observer | None = None
        self._later_use_LE = torch.zeros(spec.num_layers, spec.num_experts)
        self._counters = Counters(spec.num_layers)
        self._stall_s = 0.0
        self._name = f"{_NAME_PREFIX}{id(self):x}"
        configs: dict[int, Any] = {id(moe.experts.config): moe.experts.config for moe in layers}
        self._implementations: list[tuple[Any, str | None]] = [
            (config, config._experts_implementation) for config in configs.values()
        ]

    @property
    def events(self) -> list[Event]:
        """The cache's log; empty unless attached with ``record_events=True``."""
        return self._cache.events

    def stats(self) -> OffloadStats:
        """The counters as they are now; readable after `detach`, too."""
        counters = self._counters
        expert_bytes_L = torch.tensor(self.spec.expert_bytes_per_layer)
        return OffloadStats(
            hits=int(counters.hits_L.sum()),
            misses=int(counters.misses_L.sum()),
            streamed=int(counters.streamed_L.sum()),
            evictions=int(counters.evictions_L.sum()),
            miss_bytes=int((counters.misses_L * expert_bytes_L).sum()),
            stall_s=self._stall_s,
        )

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
        """Give the model back as it was, to the bit; a second call does nothing."""
        if self._store is None:
            return
        if self._observer is not None:
            self._observer.remove()
        self._executor = None  # its slots' memory goes before the weights come back
        for moe in self._layers:
            restore_experts(moe, self._store)
        for config, implementation in self._implementations:
            config._experts_implementation = {"": implementation}
        ALL_EXPERTS_FUNCTIONS.pop(self._name, None)
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
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
        """Free the model's experts and route its calls here; nothing in it can fail half-way."""
        for moe in self._layers:
            release_experts(moe)
        ALL_EXPERTS_FUNCTIONS[self._name] = self._experts_forward
        for config, _ in self._implementations:
            # As a mapping, it sets this config alone and leaves its subconfigs as they are.
            config._experts_implementation = {"": self._name}

    def _observe(self, model: nn.Module, predictor: Predictor) -> None:
        def keep(forecast: Forecast) -> None:
            self._later_use_LE.copy_(later_use(forecast))

        def keep_layer(layer: int, later_E: Tensor) -> None:
            self._later_use_LE[layer] = later_E

        self._observer = Observer(
            model=model,
            layers=self._layers,
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
        assert self._executor is not None
        slots = self._make_ready(layer, used_experts(top_k_index, self.spec.num_experts))
        return self._executor.compute(layer, hidden_states, top_k_index, top_k_weights, slots)

    def _make_ready(self, layer: int, used: list[int]) -> dict[int, int]:
        """One event: decide, load what gets a slot, and say where each resident expert is."""
        if not used:
            return {}
        assert self._executor is not None
        needed_E = torch.zeros(self.spec.num_experts, dtype=torch.bool)
        needed_E[used] = True
        step = self._cache.step(
            needed_E,
            layer=layer,
            forecast_LE=self._later_use_LE[layer],
            max_needed=len(used),
        )
        assert step.slot_of_LE is not None
        slot_of_E: list[int] = step.slot_of_LE.tolist()
        started_s = time.perf_counter()
        for expert in step.insert_LE.nonzero().flatten().tolist():
            self._executor.load(layer, expert, slot_of_E[expert])
        self._stall_s += time.perf_counter() - started_s
        self._counters.add(step, layer)
        return {expert: slot_of_E[expert] for expert in used if slot_of_E[expert] >= 0}

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
    store_dir: Path | str | None = None,
    record_events: bool = False,
) -> Offload:
    """Serve ``model`` with only some of its experts in memory; its outputs stay the same.

    The experts are first written to a store (unless ``store_dir`` holds it already); until that is
    complete the model is untouched, and no second copy of them is held in memory.

    Args:
        model: A transformers model on the CPU, in float32, bfloat16 or float16.
        policy: What to keep: a name of `runtime.policies.POLICIES`, or a policy.
        slots: Resident experts per MoE layer: one number, or one per layer.
        budget_bytes: Instead of ``slots``: memory for all of them, such as "12GiB".
        predictor: A fitted predictor for this model; what policies that read forecasts read.
        store_dir: Where stores live, to be found again by the next run. By default a temporary
            folder, removed by `Offload.detach`. It takes the experts' size, so let it be on a disk.
        record_events: Keep the cache's log of every hit, miss, eviction and streamed read.

    Raises:
        NotAMoEError: The model is dense, or its family bypasses transformers' ExpertsInterface.
        SpecMismatchError: The predictor was fitted for another model.
        ValueError: Slots, budget or policy cannot work, or the model is attached already.
    """
    layers = moe_layers(model)
    spec = spec_of(model)
    _check_model(layers)
    num_slots = _slots_per_layer(spec, slots, budget_bytes)
    policy = make_policy(policy) if isinstance(policy, str) else policy
    _check_foresight(policy, predictor)
    if predictor is not None:
        _check_spec(predictor, spec)
        predictor.bind(model)
    folder = None if store_dir else tempfile.TemporaryDirectory(prefix="moecast-")
    try:
        store = open_store(Path(folder.name if folder else store_dir or ""), layers)
        offload = Offload(
            layers=layers,
            spec=spec,
            slots=num_slots,
            cache=ExpertCache(
                policy,
                num_layers=spec.num_layers,
                num_experts=spec.num_experts,
                slots=torch.tensor(num_slots),
                record_events=record_events,
            ),
            store=store,
            executor=CpuExecutor(
                store=store, experts=[moe.experts for moe in layers], num_slots=num_slots
            ),
            folder=folder,
        )
    except BaseException:
        if folder is not None:
            folder.cleanup()
        raise
    if predictor is not None and policy.foresight == "forecast":
        offload._observe(model, predictor)
    offload._install()
    logger.info(
        "Attached %s: %s slots per layer, policy %s, store %s",
        spec.describe(),
        sorted(set(num_slots)),
        policy.name,
        store.path,
    )
    return offload


def _check_model(layers: Sequence[MoELayer]) -> None:
    for moe in layers:
        config: Any = moe.experts.config
        if str(config._experts_implementation).startswith(_NAME_PREFIX):
            raise ValueError(
                "the model, or one on the same config object, is attached already: detach it first"
            )
        for name, parameter in expert_parameters(moe.experts):
            if parameter.device.type != "cpu":
                raise ValueError(
                    f"{name} of layer {moe.layer} is on {parameter.device}: experts are served "
                    "from the CPU; load the model there"
                )


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
