"""Prefetching beside the slots: a small buffer takes what is expected, and displaces nothing.

A window brings a fraction of an expert where experts are large. To make room for it in a slot, a
whole expert would have to go, which a wrong guess, or a need for just that one, costs in full. So
what is expected of the next layer lands in a buffer of its own. Where it came true, the layer's
event claims it: it is copied into the newcomer's slot, within the GPU, before the experts compute.
Otherwise it is forgotten. Nothing else changes: who is resident is the policy's matter alone.

The buffer is the next layer's: written after one layer's experts, claimed before the next one's.

Shape letters: E experts per layer · N pieces.
"""

import torch
from torch import Tensor

from runtime.device_cache import CHUNK_NEURONS, Active, DeviceCache
from runtime.device_prefetch import Copies
from runtime.expert_layout import ExpertLayout
from runtime.kernels.copy import copy_records
from runtime.kernels.landing import claim, land

_CLAIMING_PROGRAMS = 128  # of a piece; within the GPU's own memory, more are faster


class Landing:
    """The buffer, and what is in it.

    Args:
        cache: Its slots hold whole experts; what comes counts among its counters.
        layout: Of its experts' records.
        pieces: N, the most experts at a time; the buffer has a record for each.

    Attributes:
        max_neurons: That fit.

    Raises:
        ValueError: A slot is smaller than an expert.
    """

    def __init__(self, cache: DeviceCache, *, layout: ExpertLayout, pieces: int) -> None:
        if any(slots.slot_neurons < cache.num_neurons for slots in cache.memory):
            raise ValueError("landing needs slots that hold whole experts")
        device = cache.present_LE.device

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(pieces, dtype=dtype, device=device)

        self._cache = cache
        self._record_bytes = layout.record_bytes
        self._neuron_bytes = layout.num_rows * layout.hidden_size * layout.dtype.itemsize
        self._buffer_NP = torch.empty(
            pieces, layout.record_elements, dtype=layout.dtype, device=device
        )
        self.max_neurons = pieces * cache.num_neurons
        self._expert_N, self._neurons_N = zeros(torch.int32), zeros(torch.int32)
        self._landing = Copies(*(zeros(torch.int64) for _ in range(3)))
        self._claimed_bytes_N, self._slot_N = zeros(torch.int64), zeros(torch.int64)

    def fetch(
        self, layer: int, next_E: Tensor, *, least_1: Tensor, allowance_1: Tensor, left_1: Tensor
    ) -> Copies:
        """Decide what lands for a layer; the caller makes the copies.

        Args:
            layer: Whose event is next.
            next_E: float32, probabilities of use.
            least_1: float32, the least that is worth it.
            allowance_1: int32, neurons that may come; no more than `max_neurons`.
            left_1: int32, takes what is left of them.
        """
        cache = self._cache
        land(
            next_E=next_E,
            least_1=least_1,
            allowance_1=allowance_1,
            left_1=left_1,
            resident_E=cache.cache.usage.resident_LE[layer],
            home_E=cache.home_address_LE[layer],
            num_neurons=cache.num_neurons,
            neuron_bytes=self._neuron_bytes,
            record_bytes=self._record_bytes,
            chunk_neurons=CHUNK_NEURONS,
            landing_address=self._buffer_NP.data_ptr(),
            expert_N=self._expert_N,
            neurons_N=self._neurons_N,
            source_N=self._landing.source_address_N,
            target_N=self._landing.target_address_N,
            num_bytes_N=self._landing.num_bytes_N,
            counters_X=cache.counters_LX[layer],
        )
        return self._landing

    def claim(self, layer: int, active: Active) -> None:
        """The layer's event has been, and the copies are done: give newcomers what has landed."""
        claim(
            expert_N=self._expert_N,
            neurons_N=self._neurons_N,
            landed_bytes_N=self._landing.num_bytes_N,
            active=active,
            target_N=self._slot_N,
            num_bytes_N=self._claimed_bytes_N,
            counters_X=self._cache.counters_LX[layer],
        )
        copy_records(
            self._landing.target_address_N,
            self._slot_N,
            self._claimed_bytes_N,
            programs_per_record=_CLAIMING_PROGRAMS,
        )
