"""The memory of all slots on a device: one piece, cut anew whenever memory is divided otherwise.

A new division needs no new memory, so it cannot fail for want of it, and nothing of the budget is
taken twice while it is made. What the slots held is lost with the old cut.

Shape letters: L MoE layers · C slots · N elements of the pool · P elements of a slot.
"""

import torch
from torch import Tensor

from runtime.device_cache import SlotMemory
from runtime.expert_layout import ExpertLayout
from runtime.slot_split import SlotSplit, slot_bytes


class SlotPool:
    """As much memory as a split's slots take.

    Args:
        split: The first division.
        layout: Of the experts.
        device: Where.

    Attributes:
        num_bytes: Of all slots, at most.
    """

    def __init__(self, split: SlotSplit, layout: ExpertLayout, device: torch.device) -> None:
        self._layout = layout
        self.num_bytes = split.num_bytes(layout)
        self._pool_N = torch.empty(
            self.num_bytes // layout.dtype.itemsize, dtype=layout.dtype, device=device
        )

    def cut(self, split: SlotSplit) -> list[Tensor]:
        """Each layer's slots [C, P].

        Raises:
            ValueError: They would not fit.
        """
        needed_bytes = split.num_bytes(self._layout)
        if needed_bytes > self.num_bytes:
            raise ValueError(f"slots of {needed_bytes} bytes: there is memory for {self.num_bytes}")
        slots_LCP, start = [], 0
        for count, neurons in zip(split.slots, split.neurons, strict=True):
            elements = slot_bytes(neurons, self._layout) // self._layout.dtype.itemsize
            stop = start + count * elements
            slots_LCP.append(self._pool_N[start:stop].view(count, elements))
            start = stop
        return slots_LCP

    def memory(self, split: SlotSplit) -> list[SlotMemory]:
        """The same for who works with addresses."""
        return [
            SlotMemory(
                base_address=slots_CP.data_ptr(),
                slot_bytes=slots_CP.shape[1] * slots_CP.element_size(),
                num_slots=len(slots_CP),
                slot_neurons=neurons,
            )
            for slots_CP, neurons in zip(self.cut(split), split.neurons, strict=True)
        ]
