"""Experts of a tiny model, served with a routing and with forecasts that a test makes up."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from runtime.gpu_experts import GpuExperts
from runtime.pinned_store import PinnedStore
from runtime.policies import make_policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.sources import Now
from runtime.slot_split import SlotSplit
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model

NEURONS = 128  # F: two chunks


def options(*, neurons: int = NEURONS, **changed) -> PrefetchOptions:
    """With a window that lets so many neurons of `experts`' records come, without measuring."""
    record_bytes = NEURONS * 3 * 32 * 4
    given = {
        "into": "slots",
        "window_s": 1.0,
        "share": 1.0,
        "link_bytes_per_s": record_bytes * max(neurons, 1) / NEURONS,
        "displaced_use": 0.5 * min(1.0, neurons / NEURONS),  # a least probability of 1/3
        "margin": 0.1,
        "programs_per_record": 2,
    }
    return PrefetchOptions(**{**given, **changed})


class Scripted:
    """A source that says what a test has put into ``next_LE``; it keeps whom it was asked about."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.next_LE = torch.zeros(num_layers, num_experts, device=KERNEL_DEVICE)
        self.asked: list[tuple[int, int]] = []

    def next_HE(self, layers: range, now: Now) -> Tensor:
        self.asked += [(now.layer, layer) for layer in layers]
        return self.next_LE[layers.start : layers.stop]

    def say(self, layer: int, experts: Sequence[int], probability: float = 1.0) -> None:
        self.next_LE[layer].zero_()
        self.next_LE[layer, list(experts)] = probability


def experts(
    *, source: Scripted | None, slots: int | SlotSplit = 4, policy: str = "lru", prefetch=None
) -> GpuExperts:
    """3 layers of 8 experts, top-2, of which ``slots`` are resident."""
    model = tiny_model("mixtral", intermediate_size=NEURONS)
    layers, spec = moe_layers(model), spec_of(model)
    store = PinnedStore.take(layers, torch.device(KERNEL_DEVICE))
    return GpuExperts(
        layers=layers,
        spec=spec,
        slots=slots if isinstance(slots, SlotSplit) else (slots,) * spec.num_layers,
        policy=make_policy(policy),
        store=store,
        prefetch_by=source,
        prefetch=prefetch or options(),
    )


def serve(
    backend: GpuExperts,
    ids_LK: Sequence[Sequence[int]],
    *,
    before: Callable[[int], None] | None = None,
    begins: bool = True,
) -> Tensor:
    """One token through all layers: the outputs, [L, D]. ``before`` is called before each layer."""
    generator = torch.Generator().manual_seed(hash(tuple(map(tuple, ids_LK))) % 1000)
    outputs = []
    if begins:
        backend.begin_pass(1)
    for layer, ids_K in enumerate(ids_LK):
        if before is not None:
            before(layer)
        hidden_1D = torch.randn(1, 32, generator=generator).to(KERNEL_DEVICE)
        ids_1K = torch.tensor([list(ids_K)], device=KERNEL_DEVICE)
        weights_1K = torch.full(ids_1K.shape, 0.5, device=KERNEL_DEVICE)
        outputs.append(backend.forward(layer, hidden_1D, ids_1K, weights_1K)[0])
    backend.after_pass()
    return torch.stack(outputs).cpu()
