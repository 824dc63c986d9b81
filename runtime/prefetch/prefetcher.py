"""Prefetching inside a step: between one layer's experts and the next one's, the link works.

After a layer's experts have been computed, the link is idle until the next ones' misses: attention,
norms and routers need none of it. In that window a side stream decides and copies
(`runtime.kernels.copy`) what a `Source` expects the next layers to need: into a buffer that the
next layer's newcomers are given from (`runtime.prefetch.landing`), or into slots
(`runtime.device_prefetch`), the nearest layer first, the rest of the allowance for those behind it.
The main stream waits for the decision
before anything touches the next layer's books, and for the copies before the next experts compute,
so that misses never share the link with a guess. The allowance (`runtime.prefetch.review`) is what
fits into the window, so that there is nothing to wait for.

The side stream forks from the main one and joins it again within a pass, which is what a CUDA graph
asks for. On a CPU everything happens in order.

Shape letters: T tokens · L MoE layers · D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runtime.device_cache import Active, DeviceCache
from runtime.device_prefetch import Copies, DevicePrefetch
from runtime.kernels.copy import copy_records
from runtime.link import seconds_of
from runtime.pinned_store import PinnedStore
from runtime.prefetch.landing import Landing
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.review import Review
from runtime.prefetch.sources import Now, Source


class Prefetcher:
    """Prefetches for a cache on the device.

    Args:
        cache: Empty, since the link is measured by copying into a slot; built `with_prefetch`,
            unless prefetches land beside the slots.
        store: The experts at home, page-locked.
        source: Who says what is needed.
        options: What is set.

    Attributes:
        review: Whether it pays.
    """

    def __init__(
        self, cache: DeviceCache, *, store: PinnedStore, source: Source, options: PrefetchOptions
    ) -> None:
        layout, device = store.layout, store.device
        num_layers, num_experts = cache.present_LE.shape
        self._cache, self._source, self._options = cache, source, options
        self._landing: Landing | None = None
        self._into_slots: DevicePrefetch | None = None
        if options.into == "landing":
            pieces = min(options.landing_records, num_experts)
            self._landing = Landing(cache, layout=layout, pieces=pieces)
        else:
            self._into_slots = DevicePrefetch(
                cache, layout=layout, max_fetches=min(options.max_fetches, num_experts)
            )
        bytes_per_s = options.link_bytes_per_s or _copies_bytes_per_s(cache, store, options)
        self._left_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self._clock_X: Tensor | None = None
        self._clocked_layer = (num_layers - 2) // 2  # one like most others
        self._side: Any = None
        if device.type == "cuda":
            from runtime.kernels.clock import new_clock  # Triton's interpreter has no clock

            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if num_layers > 1:
                self._clock_X = new_clock(device)
        self.review = Review(
            cache=cache,
            options=options,
            neurons_per_s=bytes_per_s * layout.expert_intermediate_size / layout.record_bytes,
            clock_X=self._clock_X,
            max_neurons=None if self._landing is None else self._landing.max_neurons,
        )
        self._landed_for = -1  # the layer that the landing buffer is for
        self._decided: Any = None
        self._copied: Any = None
        # What the side stream reads of the main one's memory, which would use it again otherwise.
        self._held: Now | None = None

    def fetch_after(self, now: Now) -> None:
        """Fetch what the layers after ``now.layer`` are expected to need; returns at once.

        Args:
            now: Its layer's experts have been given to the current stream, or it is -1 and
                `DeviceCache.advance` has.
        """
        ahead = 1 if self._landing is not None else self._options.layers_ahead
        last = min(now.layer + ahead, len(self._cache.memory) - 1)
        if now.layer == last:
            return
        with self._on_side():
            copies = self._decide(now, range(now.layer + 1, last + 1))
            self._decided = self._mark()
            if copies:
                self._stamp("STARTED", now.layer)
            for copy in copies:
                copy_records(*copy, programs_per_record=self._options.programs_per_record)
            if copies:
                self._stamp("COPIED", now.layer)
            self._copied = self._mark()
        self._held = now

    def join_decision(self) -> None:
        """Let the current stream wait until the books are written."""
        self._join(self._decided)
        self._decided = None

    def join_copies(self, layer: int, active: Active | None) -> None:
        """Let the current stream wait until the copies are done; ``layer`` computes next.

        Args:
            layer: The layer.
            active: What its event needs; None where kernels do not serve it.
        """
        if self._copied is not None:
            self._stamp("ARRIVED", layer - 1)
        self._join(self._copied)
        if self._landing is not None and active is not None and self._landed_for == layer:
            self._landing.claim(layer, active)
        self._landed_for = -1
        self._copied = self._held = None

    def _decide(self, now: Now, layers: range) -> list[Copies]:
        """What is to be copied for these layers."""
        copies, review = [], self.review
        allowance_1 = review.allowance_1
        for layer in layers:
            next_E = self._source.next_E(layer, now)
            if next_E is None:
                continue
            least_1 = review.least_L[layer : layer + 1]
            if self._landing is not None:
                copies.append(
                    self._landing.fetch(
                        layer,
                        next_E,
                        least_1=least_1,
                        allowance_1=allowance_1,
                        left_1=self._left_1,
                    )
                )
                self._landed_for = layer
            elif self._into_slots is not None:
                copies.append(
                    self._into_slots.fetch(
                        layer,
                        next_E >= least_1,
                        next_E,
                        margin=self._options.margin,
                        victims_by_E=self._cache.keep_LE[layer],
                        allowance_1=allowance_1,
                        left_1=self._left_1,
                    )
                )
            allowance_1 = self._left_1
        return copies

    @contextmanager
    def _on_side(self) -> Iterator[None]:
        """What follows runs beside what the current stream is given from now on."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield

    def _mark(self) -> Any:
        return None if self._side is None else self._side.record_event()

    def _join(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._side.device).wait_event(event)

    def _stamp(self, moment: str, layer: int) -> None:
        if self._clock_X is None or layer != self._clocked_layer:
            return
        from runtime.kernels import clock

        clock.stamp(
            self._clock_X,
            getattr(clock, moment),
            allowance_1=self.review.allowance_1,
            left_1=self._left_1,
        )


def _copies_bytes_per_s(cache: DeviceCache, store: PinnedStore, options: PrefetchOptions) -> float:
    """The rate of copying one record from home into slot 0, which nobody holds yet."""
    source_1 = cache.home_address_LE[0, :1]
    target_1 = torch.full_like(source_1, cache.memory[0].base_address)
    num_bytes = min(store.layout.record_bytes, cache.memory[0].slot_bytes)
    num_bytes_1 = torch.full_like(source_1, num_bytes // 16 * 16)

    def copy() -> None:
        copy_records(
            source_1, target_1, num_bytes_1, programs_per_record=options.programs_per_record
        )

    return num_bytes / seconds_of(copy, store.device)
