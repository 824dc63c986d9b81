"""The generic adapter against the stock families, and against models that it must refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.adapters import config_digest, moe_layers, probs_kind, router_probs_TE, spec_of
from data.errors import NotAMoEError
from tests.families import FAMILIES, tiny_model

EXPERT_COUNTS = {"num_experts", "num_local_experts", "n_routed_experts"}


def dense_model() -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def router_output(moe_layer: Any, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return moe_layer.router(hidden_TD)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_says_what_the_config_says(family: str) -> None:
    model = tiny_model(family)
    spec, config = spec_of(model, "mine"), model.config
    assert spec.model_id == "mine"
    sizes = FAMILIES[family]
    (num_experts,) = (size for name, size in sizes.items() if name in EXPERT_COUNTS)
    assert spec.num_experts == num_experts
    assert spec.top_k == config.num_experts_per_tok
    assert spec.hidden_size == 32
    assert spec.expert_intermediate_size == 24
    parameters = 3 * 24 * 32
    biases = 2 * 24 + 32 if family == "gpt_oss" else 0
    assert set(spec.expert_bytes_per_layer or ()) == {4 * (parameters + biases)}
    assert spec.decoder_layers == ((1, 2) if family == "deepseek_v3" else (0, 1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_router_probs_explain_which_experts_were_chosen_and_how_they_were_weighted(
    family: str,
) -> None:
    """The K chosen experts' probabilities are proportional to the weights the router gave them."""
    model = tiny_model(family)
    moe_layer = moe_layers(model)[0]
    logits_TE, weights_TK, ids_TK = router_output(moe_layer, torch.randn(7, 32))
    probs_TE = router_probs_TE(moe_layer, logits_TE)
    assert probs_TE.dtype == torch.float32
    torch.testing.assert_close(probs_TE.sum(-1), torch.ones(7))
    probs_TK = probs_TE.gather(-1, ids_TK)
    torch.testing.assert_close(
        probs_TK / probs_TK.sum(-1, keepdim=True), weights_TK / weights_TK.sum(-1, keepdim=True)
    )


def test_only_deepseek_scores_by_sigmoid() -> None:
    kinds = {family: probs_kind(tiny_model(family)) for family in FAMILIES}
    assert [family for family, kind in kinds.items() if kind == "sigmoid"] == ["deepseek_v3"]


def test_a_model_without_weights_can_be_described() -> None:
    config = tiny_model("qwen3_moe").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert spec_of(model).mismatch(spec_of(tiny_model("qwen3_moe"))) is None


def test_expert_bytes_follow_the_dtype() -> None:
    full, half = spec_of(tiny_model("olmoe")), spec_of(tiny_model("olmoe", dtype=torch.bfloat16))
    assert full.expert_bytes_per_layer is not None
    assert half.expert_bytes_per_layer == tuple(n // 2 for n in full.expert_bytes_per_layer)


def test_a_dense_model_is_refused_with_its_model_type() -> None:
    with pytest.raises(NotAMoEError, match="'llama'.*dense"):
        moe_layers(dense_model())


def test_fingerprint_survives_saving_and_another_dtype(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    digest = config_digest(model.config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, experts_implementation="eager", attn_implementation="eager"
    )
    assert config_digest(loaded.config) == digest


def test_fingerprint_tells_configs_apart() -> None:
    models = [tiny_model("qwen3_moe"), tiny_model("qwen3_moe", num_experts_per_tok=2)]
    assert len({config_digest(model.config) for model in models}) == 2
