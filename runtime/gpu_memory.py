"""What a GPU's memory must hold beside expert slots, and how many slots a budget leaves.

Knows sizes only; nothing is allocated here.

Shape letters: L MoE layers · E experts per layer · K experts per token · D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from data.adapters import MoELayer, expert_parameters
from data.schema import MoESpec
from runtime.expert_layout import ExpertLayout
from runtime.kernels.experts import MAX_TOKENS, workspace_elements

CONTEXT_TOKENS = 4096
CHUNK_TOKENS = 1024
_ACTIVATIONS_PER_TOKEN = 24  # times D elements: what a decoder layer and its experts hold at once
_GRAPH_BYTES = 64 << 20  # of graphs and libraries, as measured


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weight_bytes: Everything of the model but its routed experts.
        kv_bytes: The KV cache.
        activation_bytes: What a prompt's chunk holds at once, its logits among it.
        workspace_bytes: Of the expert kernels, for every number of tokens that decode may have.
        staging_bytes: Records on their way, in prompts.
        slot_bytes: One slot in every layer.
        slots: Per layer.
    """

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    workspace_bytes: int
    staging_bytes: int
    slot_bytes: int
    slots: int

    @property
    def fixed_bytes(self) -> int:
        """All but the slots."""
        parts = (self.weight_bytes, self.kv_bytes, self.activation_bytes, self.workspace_bytes)
        return sum(parts) + self.staging_bytes + _GRAPH_BYTES

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.fixed_bytes + self.slots * self.slot_bytes


def plan_memory(
    model: nn.Module,
    layers: Sequence[MoELayer],
    spec: MoESpec,
    budget_bytes: int,
    *,
    context_tokens: int = CONTEXT_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
    batch_size: int = 1,
    staging_buffers: int = 4,
) -> MemoryPlan:
    """The most slots per layer, the same in all, for a budget of everything on the device.

    Args:
        model: May be on the meta device: only sizes are read.
        layers: Its MoE layers.
        spec: Its MoE.
        budget_bytes: Of everything.
        context_tokens: Of the KV cache, in each row.
        chunk_tokens: Of a prompt, at once.
        batch_size: Rows of the KV cache.
        staging_buffers: Of `runtime.prefill`.

    Raises:
        ValueError: One token's experts would not fit; says the smallest budget that works.
    """
    layout = ExpertLayout.of(layers[0].experts)
    experts = {id(p) for moe in layers for _, p in expert_parameters(moe.experts)}
    weights = [p for p in model.parameters() if id(p) not in experts] + list(model.buffers())
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    itemsize = layout.dtype.itemsize
    row_bytes = _ACTIVATIONS_PER_TOKEN * spec.top_k * layout.hidden_size * itemsize
    plan = MemoryPlan(
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights),
        kv_bytes=2
        * config.num_hidden_layers
        * heads
        * head_dim
        * itemsize
        * context_tokens
        * batch_size,
        activation_bytes=chunk_tokens * row_bytes + 2 * 4 * MAX_TOKENS * config.vocab_size,
        workspace_bytes=4
        * workspace_elements(num_tokens=MAX_TOKENS, top_k=spec.top_k, layout=layout),
        staging_bytes=staging_buffers * layout.record_bytes,
        slot_bytes=spec.num_layers * layout.record_bytes,
        slots=0,
    )
    slots = min((budget_bytes - plan.fixed_bytes) // plan.slot_bytes, spec.num_experts)
    if slots < spec.top_k:
        least = plan.fixed_bytes + spec.top_k * plan.slot_bytes
        raise ValueError(
            f"budget_bytes={budget_bytes}: {spec.describe()} needs at least {least} bytes: "
            f"{plan.fixed_bytes} beside the experts ({context_tokens} tokens of context among "
            f"them) and {spec.top_k} slots in each of {spec.num_layers} layers"
        )
    return MemoryPlan(
        **{name: getattr(plan, name) for name in plan.__slots__ if name != "slots"}, slots=slots
    )


def gpu_slots_for_bytes(
    model: nn.Module, layers: Sequence[MoELayer], spec: MoESpec, budget_bytes: int
) -> int:
    """Slots per layer for a budget of everything on the GPU, with the default context."""
    return plan_memory(model, layers, spec, budget_bytes).slots
