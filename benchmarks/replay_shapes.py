"""The models whose decoding is replayed: shapes of real ones, and which trace goes with each.

Knows sizes only; `benchmarks.replay_testbed` builds them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shape and the trace that is replayed on it.

    Args:
        trace: A name of `data.importers.catalog.TRACES`; "" draws a skewed random routing.
        family: The model type of transformers.
        config: What differs from the family's defaults.
        held_out: Replay only requests of the topics that predictors are tested on; the others are
            there to fit one.
        start: The first routed token that is replayed.
        warm: Tokens before the measured ones that only fill the cache.
    """

    trace: str
    family: str
    config: Mapping[str, Any]
    held_out: bool = False
    start: int = 0
    warm: int = 256

    def small(self) -> "Shape":
        """The same family with 2 MoE layers of 8 small experts, top-2: for tests on a CPU."""
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 64,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "num_experts": 8,
            "n_routed_experts": 8,
            "num_hidden_layers": 2 + self.config.get("first_k_dense_replace", 0),
            "vocab_size": 128,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
        config = {**self.config, **{k: v for k, v in sizes.items() if k in self.config}}
        return dataclasses.replace(self, trace="", config=config, held_out=False, start=0, warm=6)


_UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": None}
SHAPES: Mapping[str, Shape] = {
    "gptoss20b": Shape(
        trace="gptoss20b",
        family="gpt_oss",
        held_out=True,
        start=2000,
        config={
            **_UNTIED,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 201_088,
        },
    ),
    "dsv2lite": Shape(
        trace="esft",
        family="deepseek_v2",
        start=2000,
        config={
            **_UNTIED,
            "hidden_size": 2048,
            "intermediate_size": 10_944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 102_400,
        },
    ),
    # The recording engine used 6 of the model's 8 experts per token; what it used is replayed.
    "qwen3_30b": Shape(
        trace="qwen",
        family="qwen3_moe",
        warm=80,
        config={
            **_UNTIED,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
            "vocab_size": 151_936,
        },
    ),
}
