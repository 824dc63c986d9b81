"""What `attach` does on a GPU, on the device that tests have.

Kernels run interpreted where there is no GPU, which takes a second for a forward pass. What does
not depend on them is tested with `attach_as_device`: the CPU's executor, treated as a device.
"""

from typing import Any

import torch

from data.adapters import moe_layers, spec_of
from predictors.base import Predictor
from runtime.backend import Backend, CpuBackend
from runtime.engine import Offload
from runtime.gpu_experts import GpuExperts
from runtime.policies import make_policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.sources import Source
from runtime.redivide import MeasuredSplit, Redivider
from runtime.slot_split import SlotSplit
from tests.devices import KERNEL_DEVICE

SLOTS = 5


def attach_kernels(
    model: Any,
    *,
    slots: int | SlotSplit = SLOTS,
    policy: str = "lru",
    predictor: Predictor | None = None,
    graph: bool = False,
    chunk_tokens: int | None = None,
    divided: MeasuredSplit | None = None,
    prefetch_by: Source | None = None,
    prefetch: PrefetchOptions | None = None,
) -> Offload:
    """What `attach(model, device="cuda")` does, step by step, with kernels."""
    layers, spec = moe_layers(model), spec_of(model)
    cut = slots if isinstance(slots, SlotSplit) else (slots,) * spec.num_layers
    backend = GpuExperts.build(
        model=model,
        layers=layers,
        spec=spec,
        slots=cut,
        policy=make_policy(policy),
        device=torch.device(KERNEL_DEVICE),
        count_routing=divided is not None,
        prefetch_by=prefetch_by,
        prefetch=prefetch,
    )
    offload = connected(
        model,
        backend,
        backend.split.slots,
        predictor=predictor,
        graph=graph,
        chunk_tokens=chunk_tokens,
    )
    if divided is not None:
        offload._divide_when_idle(Redivider(backend, divided, model))
    return offload


def attach_as_device(
    model: Any,
    *,
    slots: int = SLOTS,
    policy: str = "lru",
    predictor: Predictor | None = None,
    graph: bool = False,
) -> Offload:
    """The same without kernels: forecasts go the way that they go on a GPU."""
    layers, spec = moe_layers(model), spec_of(model)
    backend = CpuBackend.build(
        layers=layers,
        spec=spec,
        slots=(slots,) * spec.num_layers,
        policy=make_policy(policy),
        store_dir=None,
        record_events=False,
    )
    backend.device = torch.device("cpu")
    return connected(model, backend, (slots,) * spec.num_layers, predictor=predictor, graph=graph)


def connected(
    model: Any,
    backend: Backend,
    slots: tuple[int, ...],
    *,
    predictor: Predictor | None,
    graph: bool,
    chunk_tokens: int | None = None,
) -> Offload:
    layers, spec = moe_layers(model), spec_of(model)
    offload = Offload(layers=layers, spec=spec, slots=slots, backend=backend)
    offload._install()
    if chunk_tokens is not None:
        offload._cut_prompts(model, chunk_tokens)
    if graph:
        offload._capture_decoding(model, max_batch=4)
    if predictor is not None:
        offload._observe(model, layers, predictor)
    return offload
