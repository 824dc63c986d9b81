"""Bringing experts into slots ahead of their use, decided and copied by the device.

`DevicePrefetch` works on the books of a `runtime.device_cache.DeviceCache`. `fetch` decides as
`runtime.cache.ExpertCache.prefetch` does, in one launch, and writes down copies for
`runtime.kernels.copy`. Since experts are present by prefixes, a prefetch need not be whole: under
an allowance it brings what the link can carry until the layer's turn, the next one continues where
it ended, and the layer's own step misses the rest only.

**Order.** A prefetch for layer m touches what belongs to layer m, and nothing else: its rows of the
books, its copies, its slots. So it may run on a side stream while other layers compute, as long as

- it starts after the latest event of layer m has computed, or else protects what that event needs
  (`DeviceCache.needed_LE`): its experts are being read, or written through, in their slots;
- `fetch`, and then the copies, have joined the main stream before the next `DeviceCache.step` of
  layer m, and before the next `DeviceCache.advance` where the layer's event is not due, since
  `advance` scores all layers. Books say "present" as soon as a copy is decided;
- one prefetch per layer is under way at a time, as its list of copies is static.

Knows nothing of streams, of time and of who forecasts.

Shape letters: L MoE layers · E experts per layer · N copies.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.device_cache import CHUNK_NEURONS, COUNTERS, DeviceCache
from runtime.expert_layout import ExpertLayout


class Copies(NamedTuple):
    """What `runtime.kernels.copy.copy_records` takes; static tensors of one layer.

    Best forecast first. Pieces of 0 bytes stand behind the last one; their addresses mean nothing.
    """

    source_address_N: Tensor  # int64, at home
    target_address_N: Tensor  # int64, in a slot
    num_bytes_N: Tensor  # int64


class DevicePrefetch:
    """Decides prefetches for a cache on the device.

    Args:
        cache: Built `with_prefetch`; its kernels, or its reference, are used here, too.
        layout: Of its experts' records.
        max_fetches: N, the most experts that one prefetch copies.

    Raises:
        ValueError: The cache does not track prefetches, or N is out of range.
    """

    def __init__(self, cache: DeviceCache, *, layout: ExpertLayout, max_fetches: int) -> None:
        num_layers, num_experts = cache.present_LE.shape
        if cache.cache.prefetched_LE is None:
            raise ValueError("prefetch needs a cache that was built with_prefetch=True")
        if not 1 <= max_fetches <= num_experts:
            raise ValueError(f"max_fetches={max_fetches}: must be in 1..{num_experts}, the experts")
        device = cache.present_LE.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._cache, self._max_fetches = cache, max_fetches
        self._neuron_bytes = layout.num_rows * layout.hidden_size * layout.dtype.itemsize
        self._record_bytes = layout.record_bytes
        self._copies = [
            Copies(zeros(max_fetches), zeros(max_fetches), zeros(max_fetches))
            for _ in range(num_layers)
        ]
        self._arrived_LE = zeros(num_layers, num_experts).bool()
        self._anything_1 = zeros(1).int() + cache.num_neurons * max_fetches
        self._left_1 = zeros(1).int()
        self._ids_E = torch.arange(num_experts, device=device)

    def copies(self, layer: int) -> Copies:
        """What the layer's latest prefetch is to copy."""
        return self._copies[layer]

    def fetch(
        self,
        layer: int,
        want_E: Tensor,
        forecast_E: Tensor,
        *,
        margin: float = 0.0,
        victims_by_E: Tensor | None = None,
        allowance_1: Tensor | None = None,
        left_1: Tensor | None = None,
        protected_E: Tensor | None = None,
    ) -> Copies:
        """Decide what comes into a layer's slots; the caller makes the copies.

        Who comes and who goes is decided as by `ExpertCache.prefetch`: best forecast first, free
        slots first, and nothing goes whose forecast is not lower by more than ``margin``. Beyond
        that, wanted experts that are in a slot in part are continued; they take their turn, by
        forecast, among those that come. An expert of which the allowance leaves no chunk of
        neurons does not come, and displaces nothing.

        Policies see an arrival as they do in `ExpertCache`, at the step of the layer's latest
        event, and `DeviceCache.keep_LE` is mended where the next event is due.

        Args:
            layer: The layer.
            want_E: bool.
            forecast_E: float32, comparable between experts of the layer; no NaN.
            margin: Not negative.
            victims_by_E: float32, as `ExpertCache.prefetch` has it.
            allowance_1: int32, the most neurons of this prefetch, all experts together; None = any.
            left_1: int32, takes what is left of it, for another layer's prefetch; it may be the
                same tensor.
            protected_E: bool, residents that must stay and are not copied to; see the module.

        Raises:
            ValueError: The margin is negative.
        """
        cache = self._cache
        if not margin >= 0:
            raise ValueError(f"margin={margin}: must not be negative")
        decide = self._launch if cache.has_kernels else self._reference
        decide(
            layer,
            want_E,
            forecast_E,
            victims_by_E,
            protected_E,
            margin,
            self._anything_1 if allowance_1 is None else allowance_1,
            self._left_1 if left_1 is None else left_1,
        )
        cache.rescore_arrivals(layer, self._arrived_LE[layer])
        return self._copies[layer]

    def _launch(
        self,
        layer: int,
        want_E: Tensor,
        forecast_E: Tensor,
        victims_by_E: Tensor | None,
        protected_E: Tensor | None,
        margin: float,
        allowance_1: Tensor,
        left_1: Tensor,
    ) -> None:
        from runtime.kernels.cache_prefetch import cache_prefetch  # as in `DeviceCache`

        cache = self._cache
        books, usage, slots = cache.cache, cache.cache.usage, cache.memory[layer]
        assert books.slot_of_LE is not None
        assert books.prefetched_LE is not None
        assert cache.displaced_LE is not None
        cache_prefetch(
            want_E=want_E,
            forecast_E=forecast_E,
            victims_by_E=victims_by_E,
            protected_E=protected_E,
            margin=margin,
            max_fetches=self._max_fetches,
            allowance_1=allowance_1,
            left_1=left_1,
            is_due=cache.is_due(layer),
            capacity=slots.num_slots,
            num_neurons=cache.num_neurons,
            slot_neurons=slots.slot_neurons,
            slot_base=slots.base_address,
            slot_bytes=slots.slot_bytes,
            neuron_bytes=self._neuron_bytes,
            record_bytes=self._record_bytes,
            chunk_neurons=CHUNK_NEURONS,
            uses=cache.policy.uses,
            used_1=books.used_L1[layer],
            step_1=usage.step_L1[layer],
            resident_E=usage.resident_LE[layer],
            slot_of_E=books.slot_of_LE[layer],
            last_use_E=usage.last_use_LE[layer],
            inserted_E=usage.inserted_LE[layer],
            visits_E=usage.visits_LE[layer],
            prefetched_E=books.prefetched_LE[layer],
            displaced_E=cache.displaced_LE[layer],
            present_E=cache.present_LE[layer],
            home_E=cache.home_address_LE[layer],
            address_E=cache.address_LE[layer],
            arrived_E=self._arrived_LE[layer],
            **self._copies[layer]._asdict(),
            counters_X=cache.counters_LX[layer],
        )

    def _reference(
        self,
        layer: int,
        want_E: Tensor,
        forecast_E: Tensor,
        victims_by_E: Tensor | None,
        protected_E: Tensor | None,
        margin: float,
        allowance_1: Tensor,
        left_1: Tensor,
    ) -> None:
        """What the kernel does, by way of `ExpertCache.prefetch`."""
        cache, copies, most = self._cache, self._copies[layer], self._max_fetches
        usage, slots = cache.cache.usage, cache.memory[layer]
        present_E = cache.present_LE[layer]
        resident_E = usage.resident_LE[layer].clone()

        def portions(wanted_E: Tensor) -> tuple[Tensor, Tensor]:
            """In the order of forecasts, and of all alike: the experts, and the neurons of each."""
            key_E = torch.where(wanted_E, -forecast_E, math.inf)
            # Stable sorts, last key first: wanted before others, whatever their forecasts are.
            order_E = key_E.argsort(stable=True)
            order_E = order_E[(~wanted_E)[order_E].int().argsort(stable=True)]
            missing_E = (wanted_E * (slots.slot_neurons - present_E))[order_E]
            left_E = (allowance_1 - missing_E.cumsum(0) + missing_E).clamp(min=0)
            chunks_E = left_E // CHUNK_NEURONS * CHUNK_NEURONS
            portion_E = torch.where(missing_E <= left_E, missing_E, chunks_E)
            return order_E, portion_E * (self._ids_E < most)

        wanted_E = want_E & (present_E < slots.slot_neurons)
        order_E, portion_E = portions(wanted_E)
        first_E = torch.zeros_like(want_E).scatter_(0, order_E, portion_E > 0)
        due = int(cache.is_due(layer))
        usage.step_L1[layer] -= due  # `advance` has counted the event that is to come
        step = cache.cache.prefetch(
            first_E,
            forecast_E,
            layer=layer,
            margin=margin,
            max_fetches=most,
            victims_by_LE=victims_by_E,
            protected_LE=protected_E,
        )
        usage.step_L1[layer] += due
        assert step.wasted_LE is not None
        wasted_neurons = (step.wasted_LE * present_E).sum()
        cache.readdress(layer)
        home_E, address_E = cache.home_address_LE[layer], cache.address_LE[layer]
        order_E, portion_E = portions(wanted_E & (step.insert_LE | (resident_E & ~step.evict_LE)))
        start_E = present_E[order_E].long()
        is_whole_E = start_E + portion_E == cache.num_neurons
        tail_bytes = self._record_bytes - cache.num_neurons * self._neuron_bytes
        num_bytes_E = portion_E * self._neuron_bytes + is_whole_E * tail_bytes
        start_bytes_E = start_E * self._neuron_bytes
        copies.source_address_N.copy_((home_E[order_E] + start_bytes_E)[:most])
        copies.target_address_N.copy_((address_E[order_E] + start_bytes_E)[:most])
        copies.num_bytes_N.copy_((num_bytes_E * (portion_E > 0))[:most])
        self._arrived_LE[layer] = step.insert_LE
        present_E.masked_fill_(step.evict_LE, 0)
        present_E.scatter_add_(0, order_E, portion_E.int())
        left_1.copy_(allowance_1 - portion_E.sum())
        assert cache.displaced_LE is not None
        cache.displaced_LE[layer] |= step.evict_LE
        cache.displaced_LE[layer] &= ~step.insert_LE
        counted = {
            "evictions": step.evict_LE.sum(),
            "displaced": step.evict_LE.sum(),
            "prefetched": step.insert_LE.sum(),
            "prefetched_neurons": portion_E.sum(),
            "wasted": step.wasted_LE.sum(),
            "wasted_neurons": wasted_neurons,
        }
        for name, amount in counted.items():
            cache.counters_LX[layer, COUNTERS.index(name)] += amount
