"""Where experts are loaded and computed: the seam between decisions and bytes, and its CPU side.

The engine decides which expert takes which slot; an `ExpertExecutor` moves the bytes and computes.
One expert is computed by one function from one record, be it in a slot or still in the store, so
where an expert lies never changes a bit of the output.

Knows nothing of policies, forecasts or counters.

Shape letters: T tokens · E experts per layer · K experts per token · D hidden · F expert FFN inner
size · C slots · P elements of a record (`expert_layout`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runtime.expert_layout import ExpertLayout
from runtime.host_store import HostStore


class ExpertExecutor(Protocol):
    """What a device must offer so that a model's experts can be served on it.

    `load` brings one expert from the slow tier into a slot; `compute` is a MoE layer's routed part.
    """

    def load(self, layer: int, expert: int, slot: int) -> None:
        """Copy an expert into a slot, over whatever was there; it is ready on return."""
        ...

    def compute(
        self,
        layer: int,
        hidden_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        slots: Mapping[int, int],
    ) -> Tensor:
        """The weighted sum of each token's experts: [T, D] in the dtype of ``hidden_TD``.

        Args:
            layer: The MoE layer.
            hidden_TD: What the experts are applied to.
            topk_expert_ids_TK: Experts of each token; ids of E and above are skipped.
            topk_weights_TK: Their weights.
            slots: Expert id to slot for what is resident; the rest is read in place.
        """
        ...


class CpuExecutor:
    """Slots in one preallocated block of memory, experts computed by plain torch.

    Args:
        store: The slow tier.
        experts: Each MoE layer's experts module, for its activation.
        num_slots: C of each MoE layer.
    """

    def __init__(
        self, *, store: HostStore, experts: Sequence[nn.Module], num_slots: Sequence[int]
    ) -> None:
        self._store = store
        self._experts = experts
        layout = store.layout
        slots = torch.empty(sum(num_slots), layout.record_elements, dtype=layout.dtype)
        self._slots_CP = torch.split(slots, list(num_slots))

    def load(self, layer: int, expert: int, slot: int) -> None:
        """Copy an expert from the memory-mapped store into a slot."""
        self._slots_CP[layer][slot].copy_(self._store.record_P(layer, expert))

    def compute(
        self,
        layer: int,
        hidden_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        slots: Mapping[int, int],
    ) -> Tensor:
        """As `ExpertExecutor.compute`; sums experts in ascending order, as stock models do."""

        def record_P(expert: int) -> Tensor:
            slot = slots.get(expert)
            if slot is None:
                return self._store.record_P(layer, expert)
            return self._slots_CP[layer][slot]

        used = used_experts(topk_expert_ids_TK, self._store.num_experts)
        return routed_sum(
            self._experts[layer],
            self._store.layout,
            hidden_TD,
            topk_expert_ids_TK,
            topk_weights_TK,
            used,
            record_P,
        )


def routed_sum(
    experts: Any,
    layout: ExpertLayout,
    hidden_TD: Tensor,
    topk_expert_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    used: Sequence[int],
    record_P: Callable[[int], Tensor],
) -> Tensor:
    """A MoE layer's routed part, [T, D], expert after expert in ascending order as stock models do.

    Args:
        experts: The experts module, for its activation.
        layout: Of the records.
        hidden_TD: What the experts are applied to.
        topk_expert_ids_TK: Experts of each token; ids of E and above are skipped.
        topk_weights_TK: Their weights.
        used: The experts in ``topk_expert_ids_TK``, ascending.
        record_P: Where an expert lies; what it returned last must stay good until asked again.
    """
    output_TD = torch.zeros_like(hidden_TD)
    topk_expert_ids_KT = topk_expert_ids_TK.T
    for expert in used:
        k, t = torch.where(topk_expert_ids_KT == expert)
        expert_output_TD = expert_forward(experts, layout, record_P(expert), hidden_TD[t])
        weighted_TD = expert_output_TD * topk_weights_TK[t, k, None]
        output_TD.index_add_(0, t, weighted_TD.to(output_TD.dtype))
    return output_TD


def used_experts(topk_expert_ids_TK: Tensor, num_experts: int) -> list[int]:
    """The experts that these tokens need, ascending; ids of ``num_experts`` and above are none."""
    counts_E = torch.bincount(topk_expert_ids_TK.flatten(), minlength=num_experts)[:num_experts]
    used: list[int] = counts_E.nonzero().flatten().tolist()
    return used


def expert_forward(
    experts: Any, layout: ExpertLayout, record_P: Tensor, hidden_TD: Tensor
) -> Tensor:
    """One expert applied to its tokens: [T, D].

    The activation is the module's own (gpt-oss clamps and mixes in its own way), and sees gate and
    up in the order that the family keeps them in.

    Args:
        experts: The module that the expert belongs to; its weights are not touched.
        layout: Of the record.
        record_P: The expert, in a slot or in the store.
        hidden_TD: Its tokens.
    """
    block_FRD = layout.block_FRD(record_P)
    rows_TF = [_matmul(hidden_TD, block_FRD[:, row].T) for row in range(layout.num_rows - 1)]
    if layout.has_bias:
        up_bias_FU = layout.up_bias_FU(record_P)
        rows_TF = [row_TF + up_bias_FU[:, row] for row, row_TF in enumerate(rows_TF)]
    if layout.has_gate:
        join = torch.cat(rows_TF, -1) if layout.is_concatenated else torch.stack(rows_TF, -1)
        inner_TF = experts._apply_gate(join.flatten(1))
    else:
        inner_TF = experts.act_fn(rows_TF[0])
    output_TD: Tensor = _matmul(inner_TF, block_FRD[:, -1])
    if layout.has_bias:
        output_TD = output_TD + layout.down_bias_D(record_P)
    if getattr(experts, "has_post_expert_norm", False):
        output_TD = experts.post_expert_norm(output_TD)
    return output_TD


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where ``right`` is a strided view into a record.

    Without oneDNN, torch multiplies half-precision matrices fast only where the right one is the
    transpose of rows in memory, as gate and up are; for the down projection its fallback was 7 to
    110 times slower (2048 x 768, 1 to 64 tokens, AVX2) than going through float32, which
    accumulates alike and rounds once. On a GPU, cuBLAS takes any leading dimension.
    """
    fast = right.stride(0) == 1 or right.dtype == torch.float32 or right.device.type != "cpu"
    if fast or (right.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)
