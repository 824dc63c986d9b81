"""MoEpic's prefetcher: what is missing of the next layer's likeliest experts, into a buffer.

Once a layer's experts have computed, its successor's are fetched in the order of their predicted
scores: of an expert whose top is cached the bottom, of any other all of it. That runs beside the
next layer's attention. When its router has spoken, what came true is read in the buffer
(`runtime.device_cache.Landed`), tops in their slots meanwhile, and the rest over the link.

Nothing is displaced. As in `runtime.prefetch.prefetcher`, a side stream forks from the main one and
joins it again within a pass, which is what a CUDA graph asks for; on a CPU all is in order.

Source: MoEpic §3.2. Deviations:

- The paper stops prefetching between two experts when the router speaks. A captured copy cannot be
  stopped, so what is begun is what fits into a window of a set length; the last piece may be
  a part of what is missing of an expert, in chunks of 64 neurons.
- What came true of an absent expert goes to its slot in passing, while it is computed with.
- The paper loads into the same buffer what is missed; here that is read over the link in place.
- The buffer holds `PrefetchOptions.landing_records` experts, where the paper has K; no piece is
  begun that would not fit.
- The window is `PrefetchOptions.window_s` for all layers, and nobody sees whether it pays.

Shape letters: L MoE layers · E experts per layer · N pieces · P elements of a record.
"""

from typing import Any

import torch
from torch import Tensor

from runtime.device_cache import CHUNK_NEURONS, DeviceCache, Landed
from runtime.device_prefetch import Copies
from runtime.gpu_lane import link_record_s
from runtime.kernels.copy import copy_records
from runtime.kernels.speculate import choose, settle
from runtime.pinned_store import PinnedStore
from runtime.prefetch.options import SIDE_PRIORITY, PrefetchOptions, allowance_neurons
from runtime.prefetch.sources import Now, Source


class SpeculativePrefetcher:
    """Fetches for the next layer, whatever slots hold of its experts.

    Args:
        cache: The books; its slots may hold tops only.
        store: The experts at home, page-locked.
        source: Who says what is likely.
        options: ``window_s``, ``link_bytes_per_s``, ``share`` and ``programs_per_record`` are read.
        buffer_NP: Memory for N records, on the device.
        said_LE: float32, takes what the source has said of each layer; None if nobody asks.

    Attributes:
        allowance: Neurons that may come in a window.
    """

    def __init__(
        self,
        cache: DeviceCache,
        *,
        store: PinnedStore,
        source: Source,
        options: PrefetchOptions,
        buffer_NP: Tensor,
        said_LE: Tensor | None = None,
    ) -> None:
        layout, num_experts = store.layout, cache.present_LE.shape[1]
        device = store.device
        pieces = len(buffer_NP)

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._cache, self._layout, self._source, self._options = cache, layout, source, options
        self._said_LE = said_LE
        self._neuron_bytes = layout.num_rows * layout.hidden_size * layout.dtype.itemsize
        self._buffer_NP = buffer_NP
        bytes_per_s = options.link_bytes_per_s or (
            layout.record_bytes / link_record_s(store, self._buffer_NP[0])
        )
        self.allowance = allowance_neurons(
            window_s=options.window_s,
            neurons_per_s=bytes_per_s / self._neuron_bytes,
            share=options.share,
        )
        self._landed = Landed(zeros(num_experts, torch.int64), zeros(num_experts, torch.int32))
        self._portion_E = zeros(num_experts, torch.int32)
        self._copies = Copies(*(zeros(pieces, torch.int64) for _ in range(3)))
        self._landed_for = -1  # the layer that the buffer is for
        self._decided: Any = None
        self._copied: Any = None
        self._side: Any = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device, priority=SIDE_PRIORITY)  # type: ignore[no-untyped-call]
        # What the side stream reads of the main one's memory, which would use it again otherwise.
        self._held: tuple[Now, Tensor | None] | None = None

    def fetch_after(self, now: Now) -> None:
        """Fetch for the layer after ``now.layer``, whose experts the current stream has been given.

        Args:
            now: Where the pass is; -1 before layer 0, `DeviceCache.advance` has been.
        """
        self._landed_for = -1
        layer = now.layer + 1
        if layer == len(self._cache.memory) or not self.allowance:
            return
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):  # None changes nothing
            next_1E = self._source.next_HE(range(layer, layer + 1), now)
            if next_1E is not None:
                self._fetch(layer, next_1E[0])
            if self._side is not None:
                self._copied = self._side.record_event()
        self._held = (now, next_1E)

    def _fetch(self, layer: int, next_E: Tensor) -> None:
        choose(
            next_E=next_E,
            present_E=self._cache.present_LE[layer],
            home_E=self._cache.home_address_LE[layer],
            num_neurons=self._cache.num_neurons,
            neuron_bytes=self._neuron_bytes,
            record_bytes=self._layout.record_bytes,
            chunk_neurons=CHUNK_NEURONS,
            allowance=self.allowance,
            buffer_address=self._buffer_NP.data_ptr(),
            landed=self._landed,
            portion_E=self._portion_E,
            source_N=self._copies.source_address_N,
            target_N=self._copies.target_address_N,
            num_bytes_N=self._copies.num_bytes_N,
            counters_X=self._cache.counters_LX[layer],
        )
        if self._side is not None:
            self._decided = self._side.record_event()
        copy_records(*self._copies, programs_per_record=self._options.programs_per_record)
        if self._said_LE is not None:
            self._said_LE[layer].copy_(next_E)
        self._landed_for = layer

    def join_decision(self) -> None:
        """Let the current stream wait until the books, which it will write, have been read."""
        decided, self._decided = self._decided, None
        if decided is not None:
            torch.cuda.current_stream(self._side.device).wait_event(decided)

    def drop_broken(self) -> None:
        """A pass was broken off: what it began is waited for, and is nobody's."""
        if self._copied is not None or self._decided is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._decided = self._copied = self._held = None
        self._landed_for = -1

    def join(self, layer: int) -> Landed | None:
        """What has landed for a layer whose event the books know; the stream waits for copies."""
        copied, self._copied = self._copied, None
        if copied is not None:
            torch.cuda.current_stream(self._side.device).wait_event(copied)
        is_for, self._landed_for = self._landed_for, -1
        self._held = None
        if is_for != layer:
            return None
        settle(
            portion_E=self._portion_E,
            needed_E=self._cache.needed_LE[layer],
            counters_X=self._cache.counters_LX[layer],
        )
        return self._landed
