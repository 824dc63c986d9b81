"""What is counted without memory is what a real model takes."""

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

from data.adapters import expert_parameters, moe_layers
from data.tiny_moe import TINY_MOE_DIR
from runtime.footprint import footprint, skeleton, skeleton_of
from tests.families import FAMILIES, tiny_model

CONTEXT, BATCH = 96, 3


def likeness(model: Any, **changes: Any) -> Any:
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return skeleton(config, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_kv_cache_are_those_of_the_real_model(family: str) -> None:
    model = tiny_model(family)
    counted = footprint(likeness(model), context=CONTEXT, batch=BATCH, chunk_tokens=32)
    routed = {id(p) for moe in moe_layers(model) for _, p in expert_parameters(moe.experts)}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in routed]
    assert counted.weight_bytes == sum(t.nbytes for t in others)
    assert counted.weight_bytes - counted.token_weight_bytes == 4 * 128 * 32
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    with torch.no_grad():
        model(torch.zeros(BATCH, 1, dtype=torch.int64), past_key_values=cache)
    assert counted.kv_bytes == sum(
        value.nbytes for layer in cache.layers for value in (layer.keys, layer.values)
    )
    assert counted.experts_bytes == sum(
        moe.num_experts * counted.layout.record_bytes for moe in moe_layers(model)
    )


def test_a_tied_head_is_counted_once_and_read_by_every_token() -> None:
    model = tiny_model("mixtral", tie_word_embeddings=True)
    counted = footprint(likeness(model), context=CONTEXT, chunk_tokens=32)
    untied = footprint(likeness(tiny_model("mixtral")), context=CONTEXT, chunk_tokens=32)
    assert untied.weight_bytes - counted.weight_bytes == 4 * 128 * 32
    assert counted.token_weight_bytes == counted.weight_bytes


def test_activations_grow_with_the_chunk_and_nothing_else_does() -> None:
    model = likeness(tiny_model("qwen3_moe"))
    small, large = (
        footprint(model, context=512, chunk_tokens=chunk_tokens) for chunk_tokens in (64, 512)
    )
    assert 3 * small.activation_bytes < large.activation_bytes < 8 * small.activation_bytes
    assert (small.weight_bytes, small.kv_bytes) == (large.weight_bytes, large.kv_bytes)


def test_unfused_attention_pays_for_its_scores() -> None:
    """gpt-oss has no fused attention: heads x chunk x context, more than once, is its peak."""
    chunk_tokens = context = 256
    scores_bytes = 4 * 4 * chunk_tokens * context
    eager = footprint(likeness(tiny_model("gpt_oss")), context=context, chunk_tokens=chunk_tokens)
    fused = footprint(likeness(tiny_model("qwen3_moe")), context=context, chunk_tokens=chunk_tokens)
    assert eager.activation_bytes > 2 * scores_bytes
    assert fused.activation_bytes < scores_bytes


def test_the_count_is_the_peak_of_what_is_alive_at_once() -> None:
    """A layer's activations are gone when the next begins: more layers do not add up."""
    few, many = (
        footprint(likeness(tiny_model("mixtral", num_hidden_layers=n)), context=64, chunk_tokens=64)
        for n in (2, 8)
    )
    assert many.activation_bytes == few.activation_bytes
    assert many.kv_bytes == 4 * few.kv_bytes


def test_the_model_is_left_as_it_was() -> None:
    model = likeness(tiny_model("mixtral"))
    before = model.config._experts_implementation
    footprint(model, context=64, chunk_tokens=16)
    assert model.config._experts_implementation == before


def test_a_chunk_is_no_longer_than_the_context() -> None:
    model = likeness(tiny_model("mixtral"))
    assert footprint(model, context=64, chunk_tokens=4096).chunk_tokens == 64
    for name in ("context", "batch", "chunk_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            footprint(model, **{name: 0})


def test_a_folder_gives_its_config_and_its_dtype() -> None:
    model = skeleton_of(str(TINY_MOE_DIR), dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert footprint(model, context=64, chunk_tokens=16).layout.dtype == torch.bfloat16
