"""What a GPU's memory must hold beside expert slots, and how many slots a budget leaves.

The sum of everything on the GPU stays within the budget: other weights, KV cache, a prompt chunk's
activations, kernel workspace, staging buffers, graphs, and the slots, which get what is left.

Knows sizes only; nothing is allocated here.

Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.adapters import MoELayer
from data.schema import MoESpec
from runtime.expert_layout import ExpertLayout
from runtime.footprint import Footprint, footprint
from runtime.kernels.tiles import MAX_TOKENS, workspace_elements
from runtime.slot_split import SlotSplit

CONTEXT_TOKENS = 4096
CHUNK_TOKENS = 1024
STAGING_BUFFERS = 4  # two would do; more even out experts with few and with many tokens
_GRAPH_BYTES = 64 << 20  # of graphs and libraries, as measured
_LOGIT_BYTES = 8  # of one token and word in decode: the model's own, and float32 for sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weight_bytes: Everything of the model but its routed experts.
        kv_bytes: The KV cache.
        activation_bytes: What a prompt's chunk holds at once, and the logits of a decode step.
        workspace_bytes: Of the expert kernels, for every number of tokens that decode may have.
        staging_bytes: Records on their way, in prompts.
        slot_bytes: One slot in every layer.
        slots: Per layer.
        least_slots: K, so that one token's experts fit.
        graph_bytes: Captured graphs and libraries.
        predictor_bytes: A predictor's weights and memory of a request.
        prefetch_bytes: Of what has come ahead of its use.
    """

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    workspace_bytes: int
    staging_bytes: int
    slot_bytes: int
    slots: int
    least_slots: int
    graph_bytes: int = _GRAPH_BYTES
    predictor_bytes: int = 0
    prefetch_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """All but the slots."""
        parts = (self.weight_bytes, self.kv_bytes, self.activation_bytes, self.workspace_bytes)
        others = (self.staging_bytes, self.graph_bytes, self.predictor_bytes, self.prefetch_bytes)
        return sum(parts) + sum(others)

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.fixed_bytes + self.slots * self.slot_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest possible budget."""
        return self.fixed_bytes + self.least_slots * self.slot_bytes


def plan_memory(
    model: Footprint,
    budget_bytes: int | None,
    *,
    slots: int | None = None,
    staging_buffers: int = STAGING_BUFFERS,
    free_bytes: int | None = None,
    predictor_bytes: int = 0,
    prefetch_bytes: int = 0,
) -> MemoryPlan:
    """The most slots per layer, the same in all, for a budget of everything on the device.

    Args:
        model: What the model takes beside its experts.
        budget_bytes: Of everything; None for as much as ``slots`` need.
        slots: Instead of a budget: what is to be had.
        staging_buffers: Of `runtime.prefill`, at least 1. What is fully resident needs none.
        free_bytes: What the device has left, if known.
        predictor_bytes: What a predictor takes there.
        prefetch_bytes: What prefetching takes there, unless everything is resident.

    Raises:
        ValueError: Both or neither of budget and slots are given, one is out of range, one token's
            experts would not fit, or the device has not so much left. Says the smallest budget.
    """
    spec = model.spec
    if (budget_bytes is None) == (slots is None):
        raise ValueError(f"budget_bytes={budget_bytes} and slots={slots}: give exactly one of them")
    if staging_buffers < 1:
        raise ValueError(f"staging_buffers={staging_buffers}: must be at least 1")

    def planned(num_slots: int, staging: int) -> MemoryPlan:
        vocabulary_bytes = _LOGIT_BYTES * model.vocab_size
        return MemoryPlan(
            weight_bytes=model.weight_bytes,
            kv_bytes=model.kv_bytes,
            activation_bytes=model.activation_bytes + model.batch * vocabulary_bytes,
            workspace_bytes=4
            * workspace_elements(num_tokens=MAX_TOKENS, top_k=spec.top_k, layout=model.layout),
            staging_bytes=staging * model.layout.record_bytes,
            slot_bytes=spec.num_layers * model.layout.record_bytes,
            slots=num_slots,
            least_slots=spec.top_k,
            predictor_bytes=predictor_bytes,
            prefetch_bytes=prefetch_bytes if staging else 0,
        )

    whole = planned(spec.num_experts, 0)
    none = planned(0, staging_buffers)
    least_bytes = min(none.least_bytes, whole.total_bytes)
    if slots is not None:
        if not spec.top_k <= slots <= spec.num_experts:
            raise ValueError(
                f"slots={slots}: {spec.describe()} can have {spec.top_k}..{spec.num_experts}"
            )
        plan = whole if slots == spec.num_experts else planned(slots, staging_buffers)
        budget_bytes = plan.total_bytes
    else:
        assert budget_bytes is not None
        if budget_bytes < least_bytes:
            raise ValueError(
                f"budget_bytes={budget_bytes}: {spec.describe()} needs at least {least_bytes} "
                f"bytes ({_gib(least_bytes)}): {_gib(none.fixed_bytes)} beside the experts "
                f"({model.context} tokens of context x {model.batch}, prompt chunks of "
                f"{model.chunk_tokens} among them) and {spec.top_k} slots in each of "
                f"{spec.num_layers} layers"
            )
        if budget_bytes >= whole.total_bytes:
            plan = whole
        else:
            fitting = (budget_bytes - none.fixed_bytes) // none.slot_bytes
            plan = planned(min(fitting, spec.num_experts - 1), staging_buffers)
    _check_room(budget_bytes, free_bytes, least_bytes)
    return plan


def _check_room(budget_bytes: int, free_bytes: int | None, least_bytes: int) -> None:
    if free_bytes is not None and budget_bytes > free_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes} ({_gib(budget_bytes)}), but the device has only "
            f"{free_bytes} bytes ({_gib(free_bytes)}) free: free some of it, or lower the budget; "
            f"the smallest possible is {least_bytes} ({_gib(least_bytes)})"
        )


def gpu_slots_for_bytes(
    model: nn.Module,
    layers: Sequence[MoELayer],
    spec: MoESpec,
    budget_bytes: int,
    *,
    device: torch.device | None = None,
    predictor_bytes: int = 0,
    prefetch_bytes: int = 0,
    context_tokens: int = CONTEXT_TOKENS,
    split: SlotSplit | None = None,
) -> int | None:
    """Slots per layer for a budget of everything on the GPU.

    Args:
        model: As loaded; only its configuration, class and dtype are read.
        layers: Its MoE layers.
        spec: Its MoE.
        budget_bytes: Of everything.
        device: Where it is to be served: checked for room if the model is not there yet.
        predictor_bytes: What a predictor takes there.
        prefetch_bytes: What prefetching does.
        context_tokens: Positions of the one KV cache.
        split: Only see whether slots that are split so fit; returns None.

    Raises:
        ValueError: They do not, or the budget cannot be. Says the smallest possible one.
    """
    counted = _counted(model, layers, context_tokens)
    free_bytes = _room_bytes(layers, device)
    if split is None:
        return plan_memory(
            counted,
            budget_bytes,
            free_bytes=free_bytes,
            predictor_bytes=predictor_bytes,
            prefetch_bytes=prefetch_bytes,
        ).slots
    fixed_bytes = plan_memory(
        counted,
        None,
        slots=spec.top_k,
        predictor_bytes=predictor_bytes,
        prefetch_bytes=prefetch_bytes,
    ).fixed_bytes
    least_bytes = fixed_bytes + split.num_bytes(counted.layout)
    if least_bytes > budget_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes}: {split.describe(counted.layout)} need at least "
            f"{least_bytes} bytes ({_gib(least_bytes)}), {_gib(fixed_bytes)} beside the slots"
        )
    _check_room(budget_bytes, free_bytes, least_bytes)
    return None


def _counted(model: nn.Module, layers: Sequence[MoELayer], context_tokens: int) -> Footprint:
    """What a model as it is loaded will take, from its configuration, class and dtype."""
    kind: Any = type(model)
    with torch.device("meta"):
        likeness = kind._from_config(
            copy.deepcopy(model.config), dtype=ExpertLayout.of(layers[0].experts).dtype
        )
    return footprint(likeness, context=context_tokens, batch=1, chunk_tokens=CHUNK_TOKENS)


def _room_bytes(layers: Sequence[MoELayer], device: torch.device | None) -> int | None:
    """What ``device`` has left for a model that is not there yet; None if it is, or not known."""
    home = next(layers[0].experts.parameters()).device
    if device is None or device.type != "cuda" or home.type == "cuda":
        return None
    return free_bytes_of(device)


def context_of(model: nn.Module, wanted: int | None = None) -> int:
    """Positions that memory is planned for: as wanted, or `CONTEXT_TOKENS` if the model has them.

    Raises:
        ValueError: The model has fewer than are wanted, or no prompt and answer fit.
    """
    config: Any = model.config
    most: int | None = getattr(
        config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    if wanted is None:
        return min(CONTEXT_TOKENS, most or CONTEXT_TOKENS)
    if wanted < 2 or (most is not None and wanted > most):
        upper = "" if most is None else f" and at most max_position_embeddings={most}"
        raise ValueError(f"context_tokens={wanted}: must be at least 2{upper}")
    return wanted


def allocated_bytes(model: nn.Module, device: torch.device) -> int:
    """What others than ``model`` hold on a CUDA device; 0 if the model is there already."""
    if next(model.parameters()).device.type == "cuda":
        return 0
    return torch.cuda.memory_allocated(device)


def free_bytes_of(device: torch.device) -> int:
    """What a CUDA device has left, what torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
