"""A model with a quarter of its experts in memory says token for token what it says with all.

Random weights are drawn wide (`tests.families`): the two best logits of every greedy step are
further apart than float32 rounding, so a wrong expert, weight or bias changes the text.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.adapters import spec_of
from data.tiny_moe import TINY_MOE_DIR
from runtime.engine import attach
from tests.families import FAMILIES, tiny_model

NUM_NEW_TOKENS = 200
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def generate(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None, *, num_new: int) -> Tensor:
    return model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT) if mask_BT is None else mask_BT,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
    )


def quarter(model: Any) -> int:
    """A quarter of the experts; every family here has at least 4 * top_k of them, so they fit."""
    spec = spec_of(model)
    assert spec.num_experts >= 4 * spec.top_k
    return spec.num_experts // 4


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BT).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_resident_models_with_a_quarter_of_the_experts(family: str) -> None:
    model = tiny_model(family)
    ids_BT = torch.tensor([PROMPT])
    expected_BT = generate(model, ids_BT, num_new=NUM_NEW_TOKENS)
    with attach(model, slots=quarter(model)) as offload:
        output_BT = generate(model, ids_BT, num_new=NUM_NEW_TOKENS)
        stats = offload.stats()
    assert output_BT.tolist() == expected_BT.tolist()
    assert stats.misses > 0
    assert stats.hits > 0
    assert len(set(output_BT[0].tolist())) > 10, "a text that repeats itself would prove little"


def test_the_embedded_model_says_the_same_with_a_quarter_of_its_experts() -> None:
    """A trained model: its routing has habits, its logits were not made to be far apart."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()
    ids_BT = torch.tensor([[1, *range(300, 320)]])
    expected_BT = generate(model, ids_BT, num_new=NUM_NEW_TOKENS)
    with attach(model, slots=quarter(model)) as offload:
        assert torch.equal(generate(model, ids_BT, num_new=NUM_NEW_TOKENS), expected_BT)
        assert offload.stats().misses > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_says_what_the_resident_model_says(family: str) -> None:
    model = tiny_model(family)
    ids_BT = torch.tensor([[0, 0, 0, *PROMPT[:5]], PROMPT])
    mask_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    expected_BT = generate(model, ids_BT, mask_BT, num_new=20)
    with attach(model, slots=quarter(model)):
        assert generate(model, ids_BT, mask_BT, num_new=20).tolist() == expected_BT.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_that_needs_more_experts_than_slots_reads_the_rest_in_place(family: str) -> None:
    model = tiny_model(family)
    ids_BT = torch.arange(1, 65)[None]
    expected_BTV = logits(model, ids_BT)
    with attach(model, slots=quarter(model)) as offload:
        output_BTV = logits(model, ids_BT)
        assert offload.stats().streamed > 0
    torch.testing.assert_close(output_BTV, expected_BTV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_slots_never_changes_a_bit(family: str) -> None:
    model = tiny_model(family)
    ids_BT = torch.arange(1, 65)[None]
    outputs = []
    for slots in (quarter(model), spec_of(model).num_experts):
        with attach(model, slots=slots):
            outputs.append(logits(model, ids_BT))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rounds_as_the_stock_eager_forward_does(
    family: str, dtype: torch.dtype
) -> None:
    """Same products, same sums in the same order; what may differ is a last bit here and there.

    On AVX2 most of these cases are equal to the bit. One router decision that tips costs 2 to 10 %
    of the logits' norm, so the tolerance leaves room for none.
    """
    model = tiny_model(family, dtype=dtype)
    model.set_experts_implementation("eager")
    ids_BT = torch.tensor([PROMPT])
    expected_BTV = logits(model, ids_BT).float()
    with attach(model, slots=quarter(model)):
        output_BTV = logits(model, ids_BT).float()
    assert (output_BTV - expected_BTV).norm() < 0.01 * expected_BTV.norm()
