"""Dividing a GPU's slots anew while nobody is served, by what was measured and counted.

MoEpic counts while it serves, and every so many tokens, once it is idle, it divides memory by
Algorithm 1. `Redivider.when_idle` does: kernels have counted (`runtime.split_counts`), the link and
the experts were timed at the start, and `runtime.split_budget` says who gets how much. What cannot
be applied leaves the division as it was, is logged and counted.

Source: MoEpic §3.4.2. Deviations: before anything was counted slots hold whole experts, not halves,
which lose in every replay of ours (docs/log.md). The window for prefetching is the one that the
prefetcher is allowed, between every two layers alike; without a prefetcher it is none. Counts begin
anew with each division.

Shape letters: L MoE layers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from runtime.backend import OffloadStats
from runtime.slot_split import SlotSplit
from runtime.split_budget import (
    LayerStatistics,
    SplitPlan,
    SplitTimes,
    allocate,
    allocate_optimally,
)

if TYPE_CHECKING:  # its kernels need triton
    from runtime.gpu_experts import GpuExperts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSplit:
    """That slots are divided by measurements, and when.

    Args:
        every_tokens: Decoded tokens between two divisions, the paper's tau.
        search: ``algorithm1`` is the paper's; ``optimal`` solves the same model, which expects more
            and gained nothing in replays (docs/log.md).
        statistics: What was counted before, such as on a trace of the model; the slots are then
            divided at once.

    Raises:
        ValueError: A value is out of range.
    """

    every_tokens: int = 5000
    search: Literal["algorithm1", "optimal"] = "algorithm1"
    statistics: Sequence[LayerStatistics] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if self.every_tokens < 1:
            raise ValueError(f"every_tokens={self.every_tokens}: must be at least 1")
        if self.search not in ("algorithm1", "optimal"):
            raise ValueError(f"search={self.search!r}: must be algorithm1 or optimal")


class Redivider:
    """Divides the slots of one backend.

    Args:
        backend: Built with ``count_routing``; it serves nobody yet, since its memory is measured
            with.
        options: When, and by which search.
        model: Whose head is timed.

    Attributes:
        times: As measured.
        num_failed: Divisions that could not be applied.

    Raises:
        ValueError: There is nothing to divide.
    """

    def __init__(self, backend: "GpuExperts", options: MeasuredSplit, model: nn.Module) -> None:
        if not len(backend.divider.staging_SP):
            raise ValueError("split: every expert has a slot that holds all of it; leave it out")
        if not backend.divider.store.is_pinned:
            raise ValueError(
                "split: experts could not be page-locked, so that nothing can be measured; raise "
                "the limit of locked memory (ulimit -l), or give a SlotSplit"
            )
        self._backend, self._options = backend, options
        self.times = _measured_times(backend, model)
        self.num_failed = 0
        logger.info("Slots will be divided every %d tokens by %s", options.every_tokens, self.times)
        if options.statistics is not None:
            self._apply(options.statistics)

    @property
    def split(self) -> SlotSplit:
        """How slots are cut now."""
        return self._backend.split

    def add_to(self, stats: OffloadStats) -> OffloadStats:
        """The same figures, with what has failed here."""
        return replace(stats, slot_divisions_failed=self.num_failed)

    def when_idle(self) -> bool:
        """Nobody is served: divide, if it is time; returns whether slots lie elsewhere now.

        Waits for the device. Never to be called within a forward pass, or while one is replayed.
        """
        counts = self._backend.divider.counts
        if counts is None or counts.num_tokens < self._options.every_tokens:
            return False
        statistics = counts.layers()
        counts.reset()
        return self._apply(statistics)

    def _apply(self, statistics: Sequence[LayerStatistics]) -> bool:
        backend = self._backend
        layout = backend.divider.store.layout
        try:
            plan = self._plan(statistics)
            split = SlotSplit.of_plan(plan, layout, num_bytes=backend.divider.pool.num_bytes)
            if split == backend.split:
                logger.info("Slots stay divided as they are: %s", split.describe(layout))
                return False
            backend.divide(split)
        except (ValueError, RuntimeError) as error:  # torch's running out of memory among them
            self.num_failed += 1
            logger.warning("Slots could not be divided anew, and stay as they were: %s", error)
            return False
        logger.info(
            "Slots are divided anew: %s, expected to wait %.2f ms a token",
            split.describe(layout),
            1e3 * plan.stall_s,
        )
        return True

    def _plan(self, statistics: Sequence[LayerStatistics]) -> SplitPlan:
        parts = self._backend.divider
        memory = parts.pool.num_bytes / parts.store.layout.record_bytes
        if self._options.search == "optimal":
            unit = min(1.0, memory / (4 * len(statistics)))
            return allocate_optimally(memory, statistics, self.times, unit=unit)
        return allocate(memory, statistics, self.times)


@torch.no_grad()
def _measured_times(backend: "GpuExperts", model: Any) -> SplitTimes:
    from runtime.gpu_lane import link_record_s
    from runtime.split_times import captured_s, experts_s

    parts = backend.divider
    device = parts.store.device
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    head_s = 0.0
    if embeddings is not None:
        hidden_1D = torch.zeros_like(embeddings.weight[:1])
        head_s = captured_s(lambda: embeddings(hidden_1D), device)
    parts.staging_SP.copy_(parts.store.record_P(0, 0))  # finite numbers to compute with
    window_s = 0.0 if backend.speculative is None else parts.prefetch.window_s
    return SplitTimes(
        attention_s=window_s,
        moe_s=experts_s(
            parts.store,
            activation=backend.activations[0],
            top_k=parts.spec.top_k,
            memory_N=parts.staging_SP.view(-1),
        ),
        head_s=head_s if window_s else 0.0,
        load_s=link_record_s(parts.store, parts.staging_SP[0]),
    )
