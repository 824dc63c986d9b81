"""Tiny random models of the families that the runtime must serve, built from their stock configs.

The weights are drawn wide (`INIT_STD`) so that routers are decided and the two best logits of a
greedy step are far apart: a token-for-token comparison then tests the runtime, not rounding.
"""

from typing import Any

import torch
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
