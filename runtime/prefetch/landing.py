"""Prefetching beside the slots: a small buffer takes what is expected, and displaces nothing.

A window brings a fraction of an expert where experts are large. To make room for it in a slot, a
whole expert would have to go, which a wrong guess, or a need for just that one, costs in full. So
what is expected of the layers to come lands in a buffer of its own, the likeliest of all of them
first, window after window, until its layer's turn comes. Where it came true, the layer's event
claims it: it is copied into the newcomer's slot, within the GPU, before the experts compute.
Otherwise it is forgotten. Nothing else changes: who is resident is the policy's matter alone.

What an event misses is on the link already: where it misses anything, the copies that are decided
at that moment wait until its experts have computed; where it does not, they run beside them.

Shape letters: H layers ahead · E experts per layer · N pieces.
"""

import torch
from torch import Tensor

from runtime.device_cache import CHUNK_NEURONS, Active, DeviceCache
from runtime.device_prefetch import Copies
from runtime.expert_layout import ExpertLayout
from runtime.kernels.landing import MAX_CANDIDATES, claim, land

_CLAIMING_PROGRAMS = 128  # of a piece; within the GPU's own memory, more are faster
_INTERPRETED_PROGRAMS = 2  # where each is one after the other


class Landing:
    """The buffer, and what is in it.

    Args:
        cache: Its slots hold whole experts; what comes counts among its counters.
        layout: Of its experts' records.
        pieces: N, the most experts at a time; the buffer has a record for each.
        layers_ahead: The most layers that it looks ahead; fewer where experts are many.

    Attributes:
        max_neurons: That fit.
        layers_ahead: H.
        waits_1: int32 on the device, whether the latest copies wait.

    Raises:
        ValueError: A slot is smaller than an expert.
    """

    def __init__(
        self, cache: DeviceCache, *, layout: ExpertLayout, pieces: int, layers_ahead: int
    ) -> None:
        if any(slots.slot_neurons < cache.num_neurons for slots in cache.memory):
            raise ValueError("landing needs slots that hold whole experts")
        num_layers, num_experts = cache.present_LE.shape
        device = cache.present_LE.device

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._cache = cache
        self._programs = _CLAIMING_PROGRAMS if device.type == "cuda" else _INTERPRETED_PROGRAMS
        self._record_bytes = layout.record_bytes
        self._neuron_bytes = layout.num_rows * layout.hidden_size * layout.dtype.itemsize
        self._buffer_NP = torch.empty(
            pieces, layout.record_elements, dtype=layout.dtype, device=device
        )
        self.max_neurons = pieces * cache.num_neurons
        self.layers_ahead = max(1, min(layers_ahead, num_layers, MAX_CANDIDATES // num_experts))
        self.waits_1 = zeros(1, torch.int32)
        self._layer_N, self._expert_N, self._neurons_N = (
            zeros(pieces, torch.int32) for _ in range(3)
        )
        self._at_once = Copies(*(zeros(pieces, torch.int64) for _ in range(3)))
        self._rest = self._at_once._replace(num_bytes_N=zeros(pieces, torch.int64))

    def fetch(
        self,
        layers: range,
        next_HE: Tensor,
        *,
        active: Active | None,
        least_L: Tensor,
        allowance_2: Tensor,
        left_1: Tensor,
        is_first: bool,
    ) -> tuple[Copies, Copies]:
        """Decide what lands for the layers to come; the caller makes the copies.

        Args:
            layers: They, the nearest one first, at most `layers_ahead`.
            next_HE: float32, their probabilities of use.
            active: The event before them, `claim` has been called for; None where a pass begins.
            least_L: float32, the least that is worth it in each layer of the model.
            allowance_2: int32, neurons that may come, no more than `max_neurons`: without the time
                that the event's experts take, and with it, for an event that misses nothing.
            left_1: int32, takes what is left of them.
            is_first: Of a pass: what lies in the buffer is an earlier one's.

        Returns:
            What may be copied at once, and what once the event's experts have computed; nothing in
            one of them.
        """
        cache = self._cache
        rows = slice(layers.start, layers.stop)
        land(
            next_HE=next_HE.contiguous(),
            least_H=least_L[rows],
            resident_HE=cache.cache.usage.resident_LE[rows],
            home_HE=cache.home_address_LE[rows],
            first_layer=layers.start,
            is_first=is_first,
            active=active,
            allowance_2=allowance_2,
            left_1=left_1,
            waits_1=self.waits_1,
            num_neurons=cache.num_neurons,
            neuron_bytes=self._neuron_bytes,
            record_bytes=self._record_bytes,
            chunk_neurons=CHUNK_NEURONS,
            landing_address=self._buffer_NP.data_ptr(),
            layer_N=self._layer_N,
            expert_N=self._expert_N,
            neurons_N=self._neurons_N,
            source_N=self._at_once.source_address_N,
            target_N=self._at_once.target_address_N,
            num_bytes_N=self._at_once.num_bytes_N,
            rest_bytes_N=self._rest.num_bytes_N,
            counters_LX=cache.counters_LX,
        )
        return self._at_once, self._rest

    def claim(self, layer: int, active: Active) -> None:
        """The layer's event has been, and the copies are done: give newcomers what has landed."""
        claim(
            layer=layer,
            layer_N=self._layer_N,
            expert_N=self._expert_N,
            neurons_N=self._neurons_N,
            landing_address=self._buffer_NP.data_ptr(),
            num_neurons=self._cache.num_neurons,
            neuron_bytes=self._neuron_bytes,
            record_bytes=self._record_bytes,
            active=active,
            counters_X=self._cache.counters_LX[layer],
            programs_per_record=self._programs,
        )
