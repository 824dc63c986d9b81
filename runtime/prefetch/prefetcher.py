"""Prefetching inside a step: whenever the link would be idle, it works ahead.

Between the moment when a layer's misses have come and the next layer's event, the link has nothing
to carry: attention, norms and routers need none of it, and where a layer misses nothing, neither do
its experts. In that window a side stream decides and copies (`runtime.kernels.copy`) what a
`Source` expects the next layers to need: into a buffer that their newcomers are given from
(`runtime.prefetch.landing`), or into slots (`runtime.device_prefetch`), the nearest layer first,
the rest of the allowance for those behind it. What lands is decided beside the experts, so that
nobody waits for the decision; slots are decided on behind them.
The main stream waits for the decision before anything touches the next layer's books, and for the
copies before the next experts compute, so that misses never share the link with a guess. The
allowance (`runtime.prefetch.review`) is what fits into the window, so that there is nothing to wait
for.

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
from runtime.prefetch.options import SIDE_PRIORITY, PrefetchOptions
from runtime.prefetch.review import Review
from runtime.prefetch.sources import Now, Source

_WARPS_BESIDE_EXPERTS = 4
"""Of a copying program. One token's experts take 240 of an SM's 256 registers a thread, with 256
threads (Triton 3.7, sm_90): then 4 warps of 32 registers find room beside them, and 8 would take an
SM from them until the copy is done."""


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
        self._layers_ahead = options.layers_ahead
        if options.into == "landing":
            pieces = min(options.landing_records, num_experts)
            self._landing = Landing(
                cache, layout=layout, pieces=pieces, layers_ahead=options.landing_layers
            )
            self._layers_ahead = self._landing.layers_ahead
        else:
            self._into_slots = DevicePrefetch(
                cache, layout=layout, max_fetches=min(options.max_fetches, num_experts)
            )
        bytes_per_s = options.link_bytes_per_s or _copies_bytes_per_s(cache, store, options)
        self._left_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self._waits_1 = self._left_1.clone() if self._landing is None else self._landing.waits_1
        self._clock_X: Tensor | None = None
        self._clocked_layer = (num_layers - 2) // 2  # one like most others
        self._side: Any = None
        if device.type == "cuda":
            from runtime.kernels.clock import new_clock  # Triton's interpreter has no clock

            self._side = torch.cuda.Stream(device, priority=SIDE_PRIORITY)  # type: ignore[no-untyped-call]
            if num_layers > 1:
                self._clock_X = new_clock(device)
        self.review = Review(
            cache=cache,
            options=options,
            neurons_per_s=bytes_per_s * layout.expert_intermediate_size / layout.record_bytes,
            clock_X=self._clock_X,
            max_neurons=None if self._landing is None else self._landing.max_neurons,
        )
        # The layer that was fetched after last in this pass; between two passes, L.
        self._latest = num_layers
        self._rest: Copies | None = None
        self._decided: Any = None
        self._copied: Any = None
        # What the side stream reads of the main one's memory, which would use it again otherwise.
        self._held: Now | None = None

    def fetch_beside(self, now: Now, active: Active | None) -> None:
        """Decide what lands while ``now.layer``'s experts compute, and copy what need not wait.

        Args:
            now: Its layer's experts will be given to the current stream next, or it is -1 and
                `DeviceCache.advance` has been.
            active: Its event, after `join_copies`; None at -1.
        """
        layers = self._layers_after(now.layer)
        if self._landing is None or not layers or self.review.is_off:
            return
        with self._on_side():
            next_HE = self._source.next_HE(layers, now)
            if next_HE is not None:
                at_once, rest = self._landing.fetch(
                    layers,
                    next_HE,
                    active=active,
                    least_L=self.review.least_L,
                    allowance_2=self.review.allowance_2,
                    left_1=self._left_1,
                    is_first=now.layer <= self._latest,
                )
                self._latest, self._rest = now.layer, rest if now.layer >= 0 else None
            self._decided = self._mark()
            if next_HE is not None:
                self._stamp("STARTED", now.layer)
                self._copy(at_once)
                self._copied = self._mark()
        self._held = now

    def fetch_after(self, now: Now) -> None:
        """Copy what had to wait for ``now.layer``'s experts, or decide on slots; returns at once.

        Args:
            now: Its layer's experts have been given to the current stream, or it is -1.
        """
        layers, rest = self._layers_after(now.layer), self._rest
        if not layers or (self._landing is not None and rest is None) or self.review.is_off:
            return
        self._stamp("COMPUTED", now.layer)
        with self._on_side():
            if self._into_slots is not None:
                self._fetch_into_slots(layers, now)
            elif rest is not None:
                self._copy(rest)
            self._stamp("COPIED", now.layer)
            self._copied = self._mark()
        self._rest, self._held = None, now

    def join_decision(self) -> None:
        """Let the current stream wait until the books are written, and read."""
        decided, self._decided = self._decided, None
        self._join(decided)

    def drop_broken(self) -> None:
        """A pass was broken off: what it began is waited for, and is nobody's."""
        if self._copied is not None or self._decided is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._decided = self._copied = self._rest = self._held = None

    def join_copies(self, layer: int, active: Active | None) -> None:
        """Let the current stream wait until the copies are done; ``layer`` computes next.

        Args:
            layer: The layer.
            active: What its event needs; None where kernels do not serve it.
        """
        if self._copied is not None:
            self._stamp("ARRIVED", layer - 1)
        copied, self._copied = self._copied, None
        self._join(copied)
        if self._landing is not None and active is not None and layer > self._latest:
            self._landing.claim(layer, active)
        if layer + 1 == len(self._cache.memory):
            self._latest = layer + 1
        self._held = None

    def _layers_after(self, layer: int) -> range:
        """Those that may be fetched for once the layer's event is decided."""
        return range(layer + 1, min(layer + 1 + self._layers_ahead, len(self._cache.memory)))

    def _fetch_into_slots(self, layers: range, now: Now) -> None:
        """Decide for each of the layers, then copy."""
        assert self._into_slots is not None
        review, copies = self.review, []
        allowance_1 = review.allowance_2[1:]  # nothing is waited for behind the experts
        next_HE = self._source.next_HE(layers, now)
        for layer, next_E in zip(layers, next_HE, strict=True) if next_HE is not None else ():
            copies.append(
                self._into_slots.fetch(
                    layer,
                    next_E >= review.least_L[layer],
                    next_E,
                    margin=self._options.margin,
                    victims_by_E=self._cache.keep_LE[layer],
                    allowance_1=allowance_1,
                    left_1=self._left_1,
                )
            )
            allowance_1 = self._left_1
        self._decided = self._mark()
        self._stamp("STARTED", now.layer)
        for copy in copies:
            self._copy(copy)

    def _copy(self, copies: Copies) -> None:
        copy_records(
            *copies,
            programs_per_record=self._options.programs_per_record,
            num_warps=_WARPS_BESIDE_EXPERTS,
        )

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
            allowance_2=self.review.allowance_2,
            left_1=self._left_1,
            waits_1=self._waits_1,
        )


def _copies_bytes_per_s(cache: DeviceCache, store: PinnedStore, options: PrefetchOptions) -> float:
    """The rate of copying one record from home into slot 0, which nobody holds yet."""
    source_1 = cache.home_address_LE[0, :1]
    target_1 = torch.full_like(source_1, cache.memory[0].base_address)
    num_bytes = min(store.layout.record_bytes, cache.memory[0].slot_bytes)
    num_bytes_1 = torch.full_like(source_1, num_bytes // 16 * 16)

    def copy() -> None:
        copy_records(
            source_1,
            target_1,
            num_bytes_1,
            programs_per_record=options.programs_per_record,
            num_warps=_WARPS_BESIDE_EXPERTS,
        )

    return num_bytes / seconds_of(copy, store.device)
