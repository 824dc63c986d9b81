"""What MoEpic's latency model reckons with, measured on the device that serves.

Kernels are timed inside a graph, since a launch by the host takes longer than they do.

Shape letters: K experts per token · E experts per layer · N elements of the memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.device_cache import Active
from runtime.kernels.activation import Activation
from runtime.kernels.experts import expert_step
from runtime.kernels.tiles import workspace_elements
from runtime.link import seconds_of
from runtime.pinned_store import PinnedStore

_CALLS = 16  # in a graph


def experts_s(store: PinnedStore, *, activation: Activation, top_k: int, memory_N: Tensor) -> float:
    """Seconds of one token's K experts of a layer, all of them in the device's memory.

    Args:
        store: The experts at home.
        activation: Of the experts.
        top_k: K.
        memory_N: Memory on the device in the experts' dtype, at least a record; only read. Where it
            holds fewer than K, some are read twice, which the device's cache may make cheaper.
    """
    layout, device = store.layout, store.device
    num_records = memory_N.numel() // layout.record_elements
    if not num_records:
        raise ValueError(f"memory of {memory_N.numel()} elements: a record has more")
    used_K = torch.arange(top_k, device=device)
    slot_address_K = memory_N.data_ptr() + used_K % num_records * layout.record_bytes
    num_neurons = layout.expert_intermediate_size
    active = Active(
        torch.full((1,), top_k, dtype=torch.int32, device=device),
        used_K.int(),
        slot_address_K,
        torch.full((top_k,), num_neurons, dtype=torch.int32, device=device),
    )
    home_address_E = store.address_LE[0].to(device)
    address_E = home_address_E.clone()
    address_E[:top_k] = slot_address_K
    hidden_1D = torch.randn(1, layout.hidden_size, device=device).to(layout.dtype)
    output_1D = torch.empty_like(hidden_1D)
    elements = workspace_elements(num_tokens=1, top_k=top_k, layout=layout)
    workspace = torch.empty(elements, device=device)
    weights_1K = torch.full((1, top_k), 1 / top_k, device=device)

    def run() -> None:
        expert_step(
            hidden_TD=hidden_1D,
            topk_expert_ids_TK=used_K[None],
            topk_weights_TK=weights_1K,
            active=active,
            home_address_E=home_address_E,
            address_E=address_E,
            slot_neurons=num_neurons,
            layout=layout,
            activation=activation,
            workspace=workspace,
            output_TD=output_1D,
        )

    return captured_s(run, device)


def captured_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of what ``run`` gives to the device, without the host's part in it."""
    if device.type != "cuda":
        return seconds_of(run, device)
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # kernels compile
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run()
    return seconds_of(graph.replay, device) / _CALLS
