"""The seam between a served model and the device that its experts live on, and its CPU side.

`runtime.offload.Offload` routes every call of a MoE layer's experts to a `Backend`; which experts
are resident, where their bytes lie and how they are computed is the backend's matter alone.
`CpuBackend` decides with an `ExpertCache`, moves bytes and computes with an `ExpertExecutor`, and
has a file as its slow tier; the GPU's is `runtime.gpu_experts.GpuExperts`.

Knows nothing of transformers, of hooks, or of how a model is attached.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · D hidden ·
C slots.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from data.adapters import MoELayer
from data.schema import MoESpec
from runtime.cache import Event, ExpertCache, Step
from runtime.expert_view import ExpertView, UseCounts
from runtime.experts import CpuExecutor, ExpertExecutor, used_experts
from runtime.host_store import HostStore, open_store, release_experts, restore_experts
from runtime.metrics import Counters
from runtime.policies.base import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadStats:
    """What serving has cost since `attach`; `runtime.metrics.Counters` says what is counted.

    Attributes:
        hits: Accesses that found their expert in a slot.
        misses: Accesses that did not: demand loads and streamed ones.
        streamed: Misses without room, read in place.
        evictions: Experts that gave up their slot.
        miss_bytes: Bytes of all misses.
        stall_s: Seconds that the host waited for demand loads (reading in place is part of
            computing). 0 where kernels fetch what they miss, since then nobody waits for a copy.
        is_pinned: Whether experts lie in page-locked memory, where GPU kernels read them in place;
            False on a GPU means that page-locking was refused and every step waits for copies.
            None where there is no GPU.
        cpu_lane_bytes: Bytes of weights, among those missing, that the host computed with.
        cpu_lane_on: Whether it is asked for a part of what is missing; False means that it fell
            behind or did not answer. None where there is no CPU lane.
        prefetched_bytes: Bytes that decode steps brought ahead of their use.
        wasted_bytes: Those of them that nobody needed while they were there.
        prefetch_layers_off: Layers where prefetching has lost, and is off.
        slot_bytes: Of all slots of a GPU, which may hold parts of experts; None on a CPU.
        slot_divisions: Times that they were cut anew.
        slot_divisions_failed: Times that they could not be, and stayed as they were.
        graph_captures: Decode steps that were captured as a graph.
        graph_replays: Forward passes that replayed one.
        eager_calls: Why forward passes did not, and how many each.
        mode: "lossless", or "resident_only": outputs are then not the model's own.
        moved: Experts brought in between requests, by `Offload.keep_resident`; no misses.
        routed: (token, expert) pairs that a router which was restricted has routed.
        rerouted: Those of them whose expert it would not have chosen.
        resident_plans: Times that a planner has decided anew who is resident.
        layers_changed: Layers in which such a decision changed something, summed over decisions.
        layers_kept: Layers that it left as they were: nobody minds, or little would be won.
        requests_of_task: Requests by the task that was read from their prompts.
        predictor: Kind of the predictor whose forecasts are asked for; None if none is.
        predictor_failed: Whether it has raised and is switched off; `policy` "lfru" goes on then.
        predictor_forgets: Whether it would follow finished requests on a host, and cannot inside
            captured steps: it says what was fitted, whatever the text.
        forecasts_used: Forward passes that had a forecast to go by.
        forecast_age_tokens: Summed over those: tokens of each request that were fed since the last
            one that the forecast knew. 0 but for predictors on a thread of their own.
        passes_shed: Forward passes that such a predictor was not shown, because too many waited.
        passes_stale: Those that it was not shown because their request was over by then.
        judged_experts: Experts used by decoded tokens of which something was forecast. None where
            that is not compared: routing on a GPU does not pass through the host.
        foreseen_experts: Those of them that stood among the K forecast highest in their layer.
        lessons_put_off: How often a predictor that learns from finished requests could not, since
            it had not done with those before.
    """

    hits: int
    misses: int
    streamed: int
    evictions: int
    miss_bytes: int
    stall_s: float
    is_pinned: bool | None = None
    cpu_lane_bytes: int = 0
    cpu_lane_on: bool | None = None
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    prefetch_layers_off: int = 0
    slot_bytes: int | None = None
    slot_divisions: int = 0
    slot_divisions_failed: int = 0
    graph_captures: int = 0
    graph_replays: int = 0
    eager_calls: Mapping[str, int] = field(default_factory=dict)
    mode: str = "lossless"
    moved: int = 0
    routed: int = 0
    rerouted: int = 0
    resident_plans: int = 0
    layers_changed: int = 0
    layers_kept: int = 0
    requests_of_task: Mapping[str, int] = field(default_factory=dict)
    predictor: str | None = None
    predictor_failed: bool = False
    predictor_forgets: bool = False
    forecasts_used: int = 0
    forecast_age_tokens: int = 0
    passes_shed: int = 0
    passes_stale: int = 0
    judged_experts: int | None = None
    foreseen_experts: int | None = None
    lessons_put_off: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits among all accesses; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


class Backend(Protocol):
    """What a device must offer so that a model's experts can be served on it.

    Building one takes the experts out of the model: their parameters show NaN until `restore`.
    `forward` serves one layer, `expect` tells what is thought to come, `stats` what it cost.

    Attributes:
        max_graph_tokens: The most tokens of a step that a graph can capture; None if none can.
        device: Where its books are kept, if that is not the host: then neither routing nor
            forecasts may pass through the host within a step.
        later_use_LE: float32, what later use is expected; to be read.
        events: The cache's log, where one is kept.
    """

    max_graph_tokens: int | None
    device: torch.device | None
    later_use_LE: Tensor

    @property
    def events(self) -> list[Event]:
        """The log of state changes; empty unless it was asked for."""
        ...

    def forward(
        self, layer: int, hidden_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> Tensor:
        """Serve one event: the weighted sum of each token's experts, [T, D], dtype of the hidden.

        Args:
            layer: The MoE layer.
            hidden_TD: What the experts are applied to.
            topk_expert_ids_TK: Experts of each token; ids of E and above are skipped.
            topk_weights_TK: Their weights.
        """
        ...

    def later_use(self, layer: int | None = None) -> Tensor:
        """Where to write what `expect` is then told, which spares a copy: [L, E], or [E].

        Nobody reads there any more when it is returned; keep it for the one write.
        """
        ...

    def expect(self, later_LE: Tensor, layer: int | None = None) -> None:
        """Say what later use to expect: float32 [L, E], or [E] of one layer."""
        ...

    def use_policy(self, policy: Policy) -> Policy:
        """Keep by another policy from here on; returns the one before."""
        ...

    def reset(self) -> None:
        """Forget everything that was served: empty slots, no counts."""
        ...

    def stats(self) -> OffloadStats:
        """The counters as they are now; readable after `restore`, too."""
        ...

    def view(self, *, goes_on: bool = True) -> ExpertView:
        """The experts as they are now; call it between two passes, on the thread that runs them.

        Args:
            goes_on: Whether somebody will look again; only then each expert's use is counted.
        """
        ...

    def restore(self) -> None:
        """Put the experts back into the model, bit for bit, and free everything else."""
        ...


class CpuBackend:
    """Experts in memory and in a memory-mapped file, computed by plain torch.

    Args:
        layers: All MoE layers of the model.
        spec: The model's MoE.
        slots: C of each layer.
        policy: What to keep.
        store: The slow tier.
        record_events: Keep the cache's log.
        folder: What to remove when the experts are back, or None.
    """

    max_graph_tokens: int | None = None
    device: torch.device | None = None

    def __init__(
        self,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: Sequence[int],
        policy: Policy,
        store: HostStore,
        record_events: bool = False,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._layers = layers
        self._spec = spec
        self._store = store
        self._folder = folder
        self._cache = ExpertCache(
            policy,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            slots=torch.tensor(slots),
            record_events=record_events,
        )
        self._executor: ExpertExecutor | None = CpuExecutor(
            store=store, experts=[moe.experts for moe in layers], num_slots=slots
        )
        self.later_use_LE = torch.zeros(spec.num_layers, spec.num_experts)
        self._counters = Counters(spec.num_layers)
        self._uses: UseCounts | None = None  # only while somebody looks
        self._stall_s = 0.0
        self._moved = 0
        for moe in layers:
            release_experts(moe)

    @classmethod
    def build(
        cls,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: Sequence[int],
        policy: Policy,
        store_dir: Path | str | None,
        record_events: bool,
    ) -> Self:
        """Write the store (or find it) and take the experts out of the model.

        Until the store is complete the model is untouched; a failure leaves no temporary folder.
        """
        folder = None if store_dir else tempfile.TemporaryDirectory(prefix="moecast-")
        try:
            store = open_store(Path(folder.name if folder else store_dir or ""), layers)
            return cls(
                layers=layers,
                spec=spec,
                slots=slots,
                policy=policy,
                store=store,
                record_events=record_events,
                folder=folder,
            )
        except BaseException:
            if folder is not None:
                folder.cleanup()
            raise

    @property
    def events(self) -> list[Event]:
        """The cache's log; empty unless built with ``record_events=True``."""
        return self._cache.events

    def later_use(self, layer: int | None = None) -> Tensor:
        """As `Backend.later_use`."""
        return self.later_use_LE if layer is None else self.later_use_LE[layer]

    def expect(self, later_LE: Tensor, layer: int | None = None) -> None:
        """As `Backend.expect`."""
        self.later_use(layer).copy_(later_LE)

    def forward(
        self, layer: int, hidden_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> Tensor:
        """As `Backend.forward`."""
        assert self._executor is not None
        slots = self._make_ready(layer, used_experts(topk_expert_ids_TK, self._spec.num_experts))
        return self._executor.compute(layer, hidden_TD, topk_expert_ids_TK, topk_weights_TK, slots)

    def use_policy(self, policy: Policy) -> Policy:
        """As `Backend.use_policy`; what it reads of the past is counted from now on."""
        before, self._cache.policy = self._cache.policy, policy
        return before

    def make_resident(self, resident_LE: Tensor) -> None:
        """Have these experts in slots, and no others; what has to come in is no miss.

        Args:
            resident_LE: bool, as many of each layer as it has slots.
        """
        for layer, resident_E in enumerate(resident_LE):
            step = self._decide(layer, resident_E)
            self._load(layer, step)
            self._moved += int(step.insert_LE.sum())

    def reset(self) -> None:
        """As `Backend.reset`."""
        self._cache.reset()
        self._counters = Counters(self._spec.num_layers)
        self._uses = None
        self._stall_s = 0.0

    def stats(self) -> OffloadStats:
        """As `Backend.stats`."""
        counters = self._counters
        expert_bytes_L = torch.tensor(self._spec.expert_bytes_per_layer)
        return OffloadStats(
            hits=int(counters.hits_L.sum()),
            misses=int(counters.misses_L.sum()),
            streamed=int(counters.streamed_L.sum()),
            evictions=int(counters.evictions_L.sum()),
            miss_bytes=int((counters.misses_L * expert_bytes_L).sum()),
            stall_s=self._stall_s,
            moved=self._moved,
        )

    def view(self, *, goes_on: bool = True) -> ExpertView:
        """As `Backend.view`."""
        uses = self._uses or UseCounts(self._spec.num_layers, self._spec.num_experts)
        self._uses = uses if goes_on else None
        hits_LE, misses_LE = uses.take()
        reads_forecasts = self._cache.policy.foresight != "none"
        return ExpertView(
            resident_LE=self._cache.usage.resident_LE.clone(),
            expected_LE=self.later_use_LE.clone() if reads_forecasts else None,
            hits_LE=hits_LE,
            misses_LE=misses_LE,
        )

    def restore(self) -> None:
        """As `Backend.restore`; a temporary store is removed."""
        self._executor = None  # its slots' memory goes before the weights come back
        for moe in self._layers:
            restore_experts(moe, self._store)
        if self._folder is not None:
            self._folder.cleanup()

    def _make_ready(self, layer: int, used: list[int]) -> dict[int, int]:
        """One event: decide, load what gets a slot, and say where each resident expert is."""
        if not used:
            return {}
        needed_E = torch.zeros(self._spec.num_experts, dtype=torch.bool)
        needed_E[used] = True
        step = self._decide(layer, needed_E)
        started_s = time.perf_counter()
        slot_of_E = self._load(layer, step)
        self._stall_s += time.perf_counter() - started_s
        self._counters.add(step, layer)
        if self._uses is not None:
            self._uses.add(step, layer)
        return {expert: slot_of_E[expert] for expert in used if slot_of_E[expert] >= 0}

    def _decide(self, layer: int, needed_E: Tensor) -> Step:
        return self._cache.step(
            needed_E,
            layer=layer,
            forecast_LE=self.later_use_LE[layer],
            max_needed=int(needed_E.sum()),
        )

    def _load(self, layer: int, step: Step) -> list[int]:
        """Bring what gets a slot; returns each expert's slot, -1 for none."""
        assert self._executor is not None
        assert step.slot_of_LE is not None
        slot_of_E: list[int] = step.slot_of_LE.tolist()
        for expert in step.insert_LE.nonzero().flatten().tolist():
            self._executor.load(layer, expert, slot_of_E[expert])
        return slot_of_E
