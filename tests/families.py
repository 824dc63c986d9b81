"""Tiny random models of the families that the runtime must serve, and experts in any layout.

The weights are drawn wide (`INIT_STD`) so that routers are decided and the two best logits of a
greedy step are far apart: a token-for-token comparison then tests the runtime, not rounding.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

INIT_STD = 0.3
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": INIT_STD,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 16, "num_experts_per_tok": 4},
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of ``family`` in eval mode; equal arguments give equal weights."""
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "bias" in name or "router" in name or "gate.weight" in name:
            torch.nn.init.normal_(parameter, std=INIT_STD)
    return model.to(dtype).eval()


_FLAG_NAMES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
LAYOUT_FLAGS = [
    dict(zip(_FLAG_NAMES, values, strict=True))
    for values in itertools.product([False, True], repeat=len(_FLAG_NAMES))
]


class FakeExperts(nn.Module):
    """Experts in any layout that the interface knows, with a reference forward by the formula."""

    def __init__(
        self,
        num_experts: int,
        inner: int,
        hidden: int,
        *,
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
        is_concatenated: bool = True,
        has_post_expert_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.has_gate, self.has_bias = has_gate, has_bias
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        self.has_post_expert_norm = has_post_expert_norm
        self.act_fn = nn.SiLU()
        if has_post_expert_norm:
            self.post_expert_norm = nn.LayerNorm(hidden)
        up = "gate_up_proj" if has_gate else "up_proj"
        rows = 2 * inner if has_gate else inner
        shapes: dict[str, tuple[int, ...]] = {up: (rows, hidden), "down_proj": (hidden, inner)}
        if is_transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        if has_bias:
            shapes |= {f"{up}_bias": (rows,), "down_proj_bias": (hidden,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(num_experts, *shape) * INIT_STD))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """Asymmetric in gate and up, so that swapping or shuffling them shows."""
        if self.is_concatenated:
            gate, up = gate_up.chunk(2, dim=-1)
        else:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return self.act_fn(gate).clamp(max=1.0) * (up + 1)

    @torch.no_grad()
    def reference(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Token by token, expert by expert, straight from the family's own tensors."""
        output_TD = torch.zeros_like(hidden_TD)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        for t, k in itertools.product(range(ids_TK.shape[0]), range(ids_TK.shape[1])):
            if (expert := int(ids_TK[t, k])) >= self.num_experts:
                continue
            up, down = getattr(self, name)[expert], self.down_proj[expert]
            up, down = (up.T, down.T) if self.is_transposed else (up, down)
            inner = up @ hidden_TD[t]
            if self.has_bias:
                inner = inner + getattr(self, f"{name}_bias")[expert]
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            out = down @ inner
            if self.has_bias:
                out = out + self.down_proj_bias[expert]
            if self.has_post_expert_norm:
                out = self.post_expert_norm(out)
            output_TD[t] += out * weights_TK[t, k]
        return output_TD
