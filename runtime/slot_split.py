"""How a GPU's slots are cut: how many each layer has, and how many neurons of an expert they hold.

Whole experts, the same number in every layer, is the plain way. MoEpic's is to keep only the
**top** of each cached expert, its first neurons, and to give layers unequal shares: more experts
hit, and what is missing of them travels while the tops compute. `SlotSplit.of_plan` makes of such a
plan (`runtime.split_budget`) what fits into a number of bytes exactly.

Knows sizes only: `runtime.slot_pool` has the memory.

Shape letters: L MoE layers · E experts per layer · C slots · F expert FFN inner size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.schema import MoESpec
from runtime.device_cache import CHUNK_NEURONS
from runtime.expert_layout import ExpertLayout
from runtime.split_budget import SplitPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSplit:
    """Slots of every layer, and neurons of every slot.

    Args:
        slots: C of each layer, at least 1.
        neurons: Of each layer's slots: all F, or a multiple of 64 below.

    Raises:
        ValueError: The two differ in length, or a number is not positive.
    """

    slots: tuple[int, ...]
    neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if len(self.slots) != len(self.neurons):
            raise ValueError(
                f"slots of {len(self.slots)} layers, neurons of {len(self.neurons)}: must be equal"
            )
        for name in ("slots", "neurons"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1 in every layer")

    @classmethod
    def whole(cls, slots: Sequence[int], layout: ExpertLayout) -> "SlotSplit":
        """Slots that hold whole experts."""
        return cls(slots=tuple(slots), neurons=(layout.expert_intermediate_size,) * len(slots))

    @classmethod
    def of_plan(
        cls, plan: SplitPlan, layout: ExpertLayout, *, num_bytes: int | None = None
    ) -> "SlotSplit":
        """A plan in whole slots and chunks of neurons, within its memory.

        Tops are rounded down to chunks; where that leaves a layer without any, it gets one chunk
        and fewer slots (one at least, for which the thickest tops, or most slots, give way). What
        rounding has left thickens the tops that lost most by it.

        Args:
            plan: V of each layer in experts' worth, and C.
            layout: Of the experts.
            num_bytes: Of all slots; by default what the plan's memory comes to.

        Raises:
            ValueError: Not even one chunk of one expert in each layer fits.
        """
        if num_bytes is None:
            num_bytes = int(float(plan.memory_L.sum()) * layout.record_bytes + 1e-6)
        num_neurons = layout.expert_intermediate_size
        neurons = plan.split_F(num_neurons, multiple=CHUNK_NEURONS)
        slots = []
        for memory, cached, held in zip(plan.memory_L, plan.cached_L, neurons, strict=True):
            fitting = int(float(memory) * layout.record_bytes + 1e-6) // slot_bytes(held, layout)
            slots.append(max(1, min(int(cached), fitting)))
        least_bytes = len(slots) * slot_bytes(min(CHUNK_NEURONS, num_neurons), layout)
        if num_bytes < least_bytes:
            raise ValueError(
                f"{num_bytes} bytes for slots: {CHUNK_NEURONS} neurons of an expert in each of "
                f"{len(slots)} layers take {least_bytes}"
            )
        while cls(slots=tuple(slots), neurons=tuple(neurons)).num_bytes(layout) > num_bytes:
            thickest = neurons.index(max(neurons))
            if neurons[thickest] > CHUNK_NEURONS:
                neurons[thickest] = (neurons[thickest] - 1) // CHUNK_NEURONS * CHUNK_NEURONS
            else:
                slots[slots.index(max(slots))] -= 1
        lost_L = plan.share_L * num_neurons - neurons
        for layer in sorted(range(len(slots)), key=lambda layer: -lost_L[layer]):
            thicker = min(neurons[layer] + CHUNK_NEURONS, num_neurons)
            changed = [*neurons[:layer], thicker, *neurons[layer + 1 :]]
            grown = cls(slots=tuple(slots), neurons=tuple(changed))
            if grown.num_bytes(layout) <= num_bytes:
                neurons = changed
        return cls(slots=tuple(slots), neurons=tuple(neurons))

    def check(self, spec: MoESpec, layout: ExpertLayout) -> None:
        """Raise unless a model of this shape can be served so.

        Raises:
            ValueError: The number of layers, of slots or of neurons is out of range.
        """
        if len(self.slots) != spec.num_layers:
            raise ValueError(f"split of {len(self.slots)} layers: {spec.describe()} has others")
        if max(self.slots) > spec.num_experts:
            raise ValueError(f"slots={max(self.slots)}: a layer has {spec.num_experts} experts")
        num_neurons = layout.expert_intermediate_size
        for layer, held in enumerate(self.neurons):
            if held != num_neurons and (held > num_neurons or held % CHUNK_NEURONS):
                raise ValueError(
                    f"layer {layer}: neurons={held} must be F={num_neurons} or a multiple of "
                    f"{CHUNK_NEURONS} below"
                )

    def num_bytes(self, layout: ExpertLayout) -> int:
        """Of all slots."""
        return sum(
            count * slot_bytes(held, layout)
            for count, held in zip(self.slots, self.neurons, strict=True)
        )

    def holds_all(self, spec: MoESpec, layout: ExpertLayout) -> bool:
        """Whether every expert has a slot that holds all of it."""
        is_whole = min(self.neurons) == layout.expert_intermediate_size
        return is_whole and min(self.slots) == spec.num_experts

    def describe(self, layout: ExpertLayout) -> str:
        """One line for people."""
        shares = [held / layout.expert_intermediate_size for held in self.neurons]
        return (
            f"{min(self.slots)} to {max(self.slots)} slots a layer of {min(shares):.0%} to "
            f"{max(shares):.0%} of an expert, {self.num_bytes(layout) / 2**30:.2f} GiB"
        )


def slot_bytes(neurons: int, layout: ExpertLayout) -> int:
    """Of one slot: a whole record with its biases, or so many neurons' weights."""
    if neurons == layout.expert_intermediate_size:
        return layout.record_bytes
    return neurons * layout.num_rows * layout.hidden_size * layout.dtype.itemsize
