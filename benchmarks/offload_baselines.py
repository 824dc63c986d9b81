"""Decoding with offloaded experts as others do it, written as well as their way allows.

`HostSyncLru` is what most systems of the field do at their core: the host reads each layer's
routing (and so waits for the device), looks up an LRU, lets the copy engine bring what is missing
out of pinned memory, and calls cuBLAS on each expert. None of the Python that they have around it
is imitated.

`AccelerateOffload` is Hugging Face accelerate itself: as its automatic device map does, whole
layers stay on the device as far as the budget reaches; its hooks bring in those of the others.

Shape letters: T tokens · L MoE layers · C slots · E experts per layer · K experts per token ·
D hidden · F expert FFN inner size · P elements of a record.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.decode_rows import Row, Traffic
from benchmarks.replay_testbed import ReplayTestbed
from data.adapters import expert_parameters
from runtime.expert_layout import ExpertLayout

ACCELERATE_INSTALLED = importlib.util.find_spec("accelerate") is not None


def matrix_expert(
    experts: Any, layout: ExpertLayout, record_P: Tensor, hidden_TD: Tensor
) -> Tensor:
    """One expert by two matrix products, [T, D].

    The record is read as these systems keep theirs: [2F, D], then [D, F], then the biases. That is
    another order of the same bytes than `ExpertLayout`'s; of random weights either is as good, and
    this one lets cuBLAS see two plain matrices.
    """
    hidden, inner = layout.hidden_size, layout.expert_intermediate_size
    up_rows = (layout.num_rows - 1) * inner
    sizes = [up_rows * hidden, hidden * inner]
    if layout.has_bias:
        sizes += [up_rows, hidden]
    parts = torch.split(record_P[: sum(sizes)], sizes)
    up_bias, down_bias = parts[2:] if layout.has_bias else (None, None)
    up = nn.functional.linear(hidden_TD, parts[0].view(up_rows, hidden), up_bias)
    inner_TF = experts._apply_gate(up) if layout.has_gate else experts.act_fn(up)
    return nn.functional.linear(inner_TF, parts[1].view(hidden, inner), down_bias)


class HostSyncLru(Row):
    """On-demand LRU with a host synchronisation per layer.

    Args:
        testbed: What is decoded.
        slots: C of every layer.
        records_LEP: Each layer's experts in pinned host memory.
    """

    same_function = False
    _IMPLEMENTATION = "benchmark-host-sync"

    def __init__(
        self, testbed: ReplayTestbed, *, slots: int, records_LEP: Sequence[Tensor]
    ) -> None:
        super().__init__("on-demand LRU, host synchronisation", testbed, slots=slots)
        self._records_LEP = records_LEP
        self._slots_LCP: list[Tensor] = []
        self._layer_of = {moe.experts: moe.layer for moe in testbed.layers}
        self._slot_of: list[OrderedDict[int, int]] = []  # of each expert, least recent first
        self._accesses = self._hits = 0
        ALL_EXPERTS_FUNCTIONS[self._IMPLEMENTATION] = self._experts_forward

    def prepare(self) -> None:
        """Let the warm-up tokens pass through the LRU, then put what it holds into the slots."""
        bed = self.testbed
        bed.use_experts(self._IMPLEMENTATION)
        self._slot_of = [OrderedDict() for _ in bed.layers]
        # One more than there are slots: what has none passes through it.
        slots_CP = bed.block_EP[:1].expand(self.slots + 1, -1)
        self._slots_LCP = [torch.empty_like(slots_CP) for _ in bed.layers]
        for layer in range(bed.num_layers):
            for ids_BK in bed.forced.ids_NBLK[: bed.warm, :, layer]:
                self._make_room(layer, ids_BK.unique().tolist())
            held = self._slot_of[layer]
            for expert, slot in held.items():
                self._slots_LCP[layer][slot].copy_(bed.block_EP[expert])
        bed.rewind()
        self._accesses = self._hits = 0

    def step(self) -> None:
        """One forward pass; the host takes part in every layer."""
        self.testbed.step(self.testbed.model)

    def traffic(self) -> Traffic:
        """As the host counted it."""
        misses = self._accesses - self._hits
        return Traffic(
            accesses=self._accesses,
            hits=self._hits,
            missed_bytes=misses * self.testbed.layout.record_bytes,
        )

    def finish(self) -> None:
        """Free the slots."""
        self._slots_LCP.clear()

    def close(self) -> None:
        """Unregister."""
        ALL_EXPERTS_FUNCTIONS.pop(self._IMPLEMENTATION, None)

    def _make_room(self, layer: int, needed: list[int]) -> list[int]:
        """Give each needed expert a slot as long as there are any; what misses is returned."""
        held = self._slot_of[layer]
        misses = [expert for expert in needed if expert not in held]
        self._accesses += len(needed)
        self._hits += len(needed) - len(misses)
        for expert in misses:
            if len(held) < self.slots:
                held[expert] = len(held)
                continue
            victim = next((resident for resident in held if resident not in needed), None)
            if victim is not None:
                held[expert] = held.pop(victim)
        for expert in sorted(needed):  # ties as our cache breaks them: the lowest id goes first
            if expert in held:
                held.move_to_end(expert)
        return misses

    def _experts_forward(
        self, experts: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        layer = self._layer_of[experts]
        # The host waits for the device here.
        needed = sorted({expert for ids in ids_TK.tolist() for expert in ids})
        misses = set(self._make_room(layer, needed))
        held, slots_CP = self._slot_of[layer], self._slots_LCP[layer]
        weights_TE = hidden_TD.new_zeros(len(hidden_TD), self.testbed.num_experts)
        weights_TE.scatter_(1, ids_TK, weights_TK.to(hidden_TD.dtype))
        output_TD = torch.zeros_like(hidden_TD)
        for expert in needed:
            record_P = slots_CP[held.get(expert, self.slots)]
            if expert in misses:
                record_P.copy_(self._records_LEP[layer][expert], non_blocking=True)
            # For all tokens: few of them cost no more than those that use the expert.
            said_TD = matrix_expert(experts, self.testbed.layout, record_P, hidden_TD)
            output_TD.addcmul_(said_TD, weights_TE[:, expert, None])
        return output_TD


class AccelerateOffload(Row):
    """accelerate's `cpu_offload` on the experts of as many layers as the budget leaves out.

    Generous to it: only experts travel, attention and routers stay on the device. Its memory is
    pageable, as accelerate keeps it; all layers share one block of it.

    Args:
        testbed: What is decoded.
        slots: What the budget pays for in every layer; turned into whole layers.
    """

    max_tokens = 1
    max_repeats = 3

    def __init__(self, testbed: ReplayTestbed, *, slots: int) -> None:
        super().__init__("accelerate cpu_offload", testbed, slots=slots)
        resident_layers = slots * testbed.num_layers // testbed.num_experts
        self._offloaded = testbed.layers[resident_layers:]
        self._layer_bytes = sum(p.numel() * p.element_size() for p in testbed.stock.values())
        self._cpu_parameters = {
            name: nn.Parameter(parameter.cpu(), requires_grad=False)
            for name, parameter in testbed.stock.items()
        }
        self._steps = 0
        self._has_run = False

    def prepare(self) -> None:
        """Hook the offloaded layers; the first time, run a step that does not count."""
        from accelerate import cpu_offload

        for moe in self._offloaded:
            for name, _ in list(expert_parameters(moe.experts)):
                moe.experts._parameters[name] = self._cpu_parameters[name]
            cpu_offload(moe.experts, execution_device=self.testbed.device)
        self.testbed.use_experts("grouped_mm")
        if not self._has_run:  # the first pass allocates
            self.testbed.rewind()
            self.testbed.step(self.testbed.model)
            self._has_run = True
        self.testbed.rewind()
        self._steps = 0

    def step(self) -> None:
        """One forward pass; the hooks copy every expert of each offloaded layer, then forget it."""
        self.testbed.step(self.testbed.model)
        self._steps += 1

    def traffic(self) -> Traffic:
        """All experts of the offloaded layers cross the link, needed or not."""
        bed = self.testbed
        hit_layers = bed.num_layers - len(self._offloaded)
        return Traffic(
            accesses=self._steps * bed.num_layers * bed.top_k,
            hits=self._steps * hit_layers * bed.top_k,
            missed_bytes=self._steps * len(self._offloaded) * self._layer_bytes,
        )

    def finish(self) -> None:
        """Take the hooks off; the other rows must not see them."""
        from accelerate.hooks import remove_hook_from_submodules

        for moe in self._offloaded:
            remove_hook_from_submodules(moe.experts)
        self.testbed.use_stock_experts()

    def close(self) -> None:
        """Free the pageable block."""
        self._cpu_parameters.clear()
