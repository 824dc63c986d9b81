"""The architectures that the recipe can train: stock transformers classes, small sizes.

Knows sizes only; nothing of texts, training or files.
"""

from collections.abc import Callable
from typing import TypeAlias

from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MoECausalLM: TypeAlias = Qwen3MoeForCausalLM | OlmoeForCausalLM
"""Models whose layers keep their router in `mlp.gate` and their experts in `mlp.experts`."""


def qwen3_moe(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """8 layers of 32 experts, top-4: 9 M parameters at a vocabulary of 4096."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def olmoe(tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """The routing of OLMoE-1B-7B: 16 layers of 64 experts, top-8, weights not renormalised.

    30 M parameters at a vocabulary of 4096. Unlike the original, two heads share a key and value
    head, and the embedding is tied to the output.
    """
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=32,
            num_hidden_layers=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


TOPOLOGIES: dict[str, Callable[[PreTrainedTokenizerFast], MoECausalLM]] = {
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
}
"""Name of a topology to the function that builds it, untrained."""
