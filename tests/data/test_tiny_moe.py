"""The embedded model as shipped."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from data.tiny_moe import TINY_MOE_DIR
from data.tiny_moe.card import render_card
from data.tiny_moe.evaluate import domain_distances_L, expert_shares_LE, run_windows
from data.tiny_moe.routing import DENSE_EXPERTS
from tests.data.tiny_moe_fakes import CHINESE, GERMAN, LATEX, STDLIB


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    """The shipped weights, with the experts forward that is fastest on long texts."""
    shipped = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32)
    shipped.set_experts_implementation(DENSE_EXPERTS)
    return shipped


def test_the_shipped_model_is_small_and_every_layer_is_a_mixture(model) -> None:
    assert sum(path.stat().st_size for path in TINY_MOE_DIR.iterdir()) <= 20_000_000
    assert type(model) is Qwen3MoeForCausalLM
    assert model.config.tie_word_embeddings
    routers = [layer.mlp.gate for layer in model.model.layers]
    assert [(router.num_experts, router.top_k) for router in routers] == [(32, 4)] * 8


def test_the_shipped_model_has_learned_python(model, tokenizer) -> None:
    text = (STDLIB / "argparse.py").read_text()[:3000]
    loss_NT, _ = run_windows(model, np.array([tokenizer(text)["input_ids"]]), batch_size=1)
    assert loss_NT.mean() < 3.0 < np.log(model.config.vocab_size)


def test_it_writes_on_greedily_and_ends_a_chat_turn(model, tokenizer) -> None:
    prompt = tokenizer("import os\n\n\ndef main():\n", return_tensors="pt")
    ids_BT = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    continuation = tokenizer.decode(ids_BT[0, prompt["input_ids"].shape[1] :])
    assert continuation.startswith("    ")
    assert continuation.strip()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "I need to find a restaurant in San Francisco."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids_BT = model.generate(**chat, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(ids_BT[0, chat["input_ids"].shape[1] :])
    assert answer.endswith("?<|end|>")


def test_every_expert_is_used_on_a_small_sample_of_text(model, tokenizer) -> None:
    texts = [(STDLIB / "argparse.py").read_text()[:7000], CHINESE, GERMAN, LATEX]
    counts_LE = np.zeros((8, 32))
    for text in texts:
        ids_NT = np.array([tokenizer(text)["input_ids"]])
        _, routes_NTLK = run_windows(model, ids_NT, batch_size=1)
        counts_LE += expert_shares_LE(routes_NTLK, num_experts=32) * routes_NTLK[:, :, 0].size
    assert (counts_LE > 0).all()


def test_domains_route_differently(model, tokenizer) -> None:
    shares_MLE = []
    for text in ((STDLIB / "argparse.py").read_text()[:4000], GERMAN * 4):
        ids_NT = np.array([tokenizer(text)["input_ids"]])
        _, routes_NTLK = run_windows(model, ids_NT, batch_size=1)
        shares_MLE.append(expert_shares_LE(routes_NTLK, num_experts=32))
    variation_L, divergence_L = domain_distances_L(np.stack(shares_MLE))
    assert variation_L.min() > 0.3
    assert divergence_L.min() > 0.1


@pytest.mark.parametrize("implementation", ["grouped_mm", DENSE_EXPERTS])
def test_experts_implementations_agree_with_the_stock_loop(
    model, tokenizer, implementation: str
) -> None:
    ids_BT = torch.tensor([tokenizer(GERMAN)["input_ids"]])
    before = model.config._experts_implementation
    try:
        with torch.no_grad():
            model.set_experts_implementation("eager")
            expected = model(ids_BT).logits
            model.set_experts_implementation(implementation)
            actual = model(ids_BT).logits
    finally:
        model.set_experts_implementation(before)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_card_is_the_one_its_metrics_give() -> None:
    metrics = json.loads((TINY_MOE_DIR / "metrics.json").read_text(encoding="utf-8"))
    assert (TINY_MOE_DIR / "README.md").read_text(encoding="utf-8") == render_card(metrics)
    assert sum(row["dead_experts"] for row in metrics["layers"]) == 0
    previous = np.mean([row["previous_token_recall"] for row in metrics["layers"]])
    assert (
        previous > 2 * metrics["config"]["num_experts_per_tok"] / metrics["config"]["num_experts"]
    )
