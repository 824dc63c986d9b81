"""Are tops computed while bottoms arrive? The expert kernel's own clock of one layer's event.

Each chunk of neurons of each expert notes when it began and when it was done. Chunks of tops read
the device's memory, those of bottoms the host's, all in one launch.

Knows one event and no rows.

Shape letters: K experts per token · A active experts · C chunks of neurons.
"""

from typing import Any

import torch

from benchmarks.replay_testbed import ReplayTestbed
from runtime.device_cache import Active
from runtime.kernels.activation import Activation
from runtime.kernels.experts import expert_step
from runtime.kernels.tiles import stream_for, workspace_elements
from runtime.pinned_store import PinnedStore


def overlap(bed: ReplayTestbed, store: PinnedStore, *, slot_neurons: int) -> dict[str, Any]:
    """One token's experts with tops of ``slot_neurons`` cached: when was what computed?

    Returns:
        Seconds since the launch's first chunk began, and shares; see the keys.
    """
    layout, K, device = bed.layout, bed.top_k, bed.device
    num_neurons = layout.expert_intermediate_size
    chunk_neurons = stream_for(layout).neurons
    num_chunks = -(-num_neurons // chunk_neurons)
    used_K = torch.arange(K, device=device)
    slot_address_K = bed.block_EP.data_ptr() + used_K * layout.record_bytes
    home_address_E = store.address_LE[0].to(device)
    hidden_1D = torch.randn(1, layout.hidden_size, device=device).to(layout.dtype)
    elements = workspace_elements(num_tokens=1, top_k=K, layout=layout)
    workspace = torch.empty(elements, device=device)
    output_1D = torch.empty_like(hidden_1D)
    weights_1K = torch.full((1, K), 1 / K, device=device)

    def run(present: int) -> torch.Tensor:
        times_AC2 = torch.zeros(K, num_chunks, 2, dtype=torch.int64, device=device)
        for _ in range(3):  # compiled and warm; the last one stays
            expert_step(
                hidden_TD=hidden_1D,
                topk_expert_ids_TK=used_K[None],
                topk_weights_TK=weights_1K,
                active=Active(
                    torch.full((1,), K, dtype=torch.int32, device=device),
                    used_K.int(),
                    slot_address_K,
                    torch.full((K,), present, dtype=torch.int32, device=device),
                ),
                home_address_E=home_address_E,
                address_E=home_address_E,
                slot_neurons=slot_neurons,
                layout=layout,
                activation=Activation.of(bed.layers[0].experts),
                workspace=workspace,
                output_TD=output_1D,
                write_through=False,
                times_AC2=times_AC2,
            )
        torch.cuda.synchronize()
        return (times_AC2 - times_AC2[..., 0].min()).double().cpu() * 1e-9

    times_AC2 = run(slot_neurons)
    ends_C = torch.arange(1, num_chunks + 1) * chunk_neurons
    starts_C = ends_C - chunk_neurons
    tops, bottoms = times_AC2[:, ends_C <= slot_neurons], times_AC2[:, starts_C >= slot_neurons]
    arriving_s = float(bottoms[..., 0].min()), float(bottoms[..., 1].max())
    spent = tops[..., 1] - tops[..., 0]
    within = tops[..., 1].clamp(max=arriving_s[1]) - tops[..., 0].clamp(min=arriving_s[0])
    all_here, none_here = run(num_neurons), run(0)
    return {
        "slot_neurons": slot_neurons,
        "num_neurons": num_neurons,
        "tops_began_s": float(tops[..., 0].min()),
        "tops_done_s": float(tops[..., 1].max()),
        "bottoms_began_s": arriving_s[0],
        "bottoms_done_s": arriving_s[1],
        "share_of_tops_within_bottoms": float(within.clamp(min=0).sum() / spent.sum()),
        "all_in_slots_s": float(all_here[..., 1].max()),
        "all_at_home_s": float(none_here[..., 1].max()),
    }
