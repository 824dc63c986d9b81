"""Counting events, and every figure that follows from the counts.

`Counters` sums what `ExpertCache.step` reports; it adds in place and reads no values, so that it
can live inside a captured graph. The functions below it turn counts into ratios, bytes and times.

Shape letters: L MoE layers. Leading dimensions ``...`` are the cache's variants.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.cache import Step


class Counters:
    """Events per layer: int64 tensors [..., L].

    An access is one expert that one event needs: K for a decoded token in a layer; for a prompt,
    each distinct expert once. It is a hit or a miss by residency at router time. A miss is inserted
    (perhaps by an eviction) or streamed. The bytes of all misses crossed the link.
    """

    def __init__(
        self, num_layers: int, *, variants: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> None:
        def zeros() -> Tensor:
            return torch.zeros(*variants, num_layers, dtype=torch.int64, device=device)

        self.hits_L, self.inserts_L, self.evictions_L = zeros(), zeros(), zeros()
        self.streamed_L, self.prefetches_L, self.wasted_L = zeros(), zeros(), zeros()

    @property
    def misses_L(self) -> Tensor:
        """Accesses that found their expert absent."""
        return self.inserts_L + self.streamed_L

    @property
    def accesses_L(self) -> Tensor:
        """Hits and misses."""
        return self.hits_L + self.misses_L

    def add(self, step: Step, layer: int | None = None) -> None:
        """Count a demand step; ``layer`` says which layer it was if the step was of one."""
        at = slice(None) if layer is None else layer
        self.hits_L[..., at].add_(step.num_hits_L1[..., 0])
        self.inserts_L[..., at].add_(step.num_inserts_L1[..., 0])
        self.streamed_L[..., at].add_(step.num_streamed_L1[..., 0])
        self._add_evictions(step, at)

    def add_prefetch(self, step: Step, layer: int | None = None) -> None:
        """Count what `ExpertCache.prefetch` returned."""
        at = slice(None) if layer is None else layer
        self.prefetches_L[..., at].add_(step.num_inserts_L1[..., 0])
        self._add_evictions(step, at)

    def _add_evictions(self, step: Step, at: slice | int) -> None:
        self.evictions_L[..., at].add_(step.num_evictions_L1[..., 0])
        if step.wasted_LE is not None:
            self.wasted_L[..., at].add_(step.wasted_LE.sum(-1))


def ratio(part: int, whole: int) -> float | None:
    """``part / whole``; None where there is nothing to divide."""
    return part / whole if whole else None


def gap_closed(hits: int, *, lfru_hits: int, belady_hits: int) -> float | None:
    """How far hits came from LFRU's (0) to Belady's (1) at the same budget; None without a gap.

    Negative for what is worse than LFRU.
    """
    return ratio(hits - lfru_hits, belady_hits - lfru_hits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Time without copies: what the misses of a decode would cost on a machine.

    Args:
        link_bytes_per_s: Host-to-device rate.
        compute_s_per_layer: Compute of one token in one MoE layer with its share of attention.
        link_latency_s: Added to every transfer.
    """

    link_bytes_per_s: float
    compute_s_per_layer: float = 0.0
    link_latency_s: float = 0.0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.link_bytes_per_s <= 0:
            raise ValueError(f"link_bytes_per_s={self.link_bytes_per_s}: must be positive")
        for name in ("compute_s_per_layer", "link_latency_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")

    def link_s(self, misses: int, miss_bytes: int) -> float:
        """Seconds of transfers, one after the other."""
        return misses * self.link_latency_s + miss_bytes / self.link_bytes_per_s

    def serial_s(self, *, layer_calls: int, misses: int, miss_bytes: int) -> float:
        """Compute and transfers one after the other: an engine that never overlaps them."""
        return layer_calls * self.compute_s_per_layer + self.link_s(misses, miss_bytes)

    def bound_s(self, *, layer_calls: int, misses: int, miss_bytes: int) -> float:
        """The longer of the two: no engine with this cache and link is faster."""
        return max(layer_calls * self.compute_s_per_layer, self.link_s(misses, miss_bytes))
