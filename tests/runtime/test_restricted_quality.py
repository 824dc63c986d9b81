"""Quality figures are what they are called."""

import math

import pytest
import torch

from data.schema import MoESpec
from runtime.restricted_quality import Full, Quality, compare, summed_up, use_of


def test_agreement_and_divergence_are_of_the_answer_and_perplexity_is_of_the_text() -> None:
    """By hand: a prompt of tokens 0, 1 and an answer 0, 1, in a vocabulary of two."""
    own_TV = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]]).log()
    full = Full(torch.tensor([0, 1, 0, 1]), 2, own_TV, torch.zeros(1, 1))
    other_TV = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.75, 0.25]]).log()
    found = compare(full, other_TV)
    assert found.agreement == 0.5  # of equals the first is said: 0 as the full model; then 0 for 1
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert found.kl_nats == pytest.approx((first + second) / 2)
    assert (found.text_nats, found.num_text) == (pytest.approx(-math.log(0.1)), 1)


def test_requests_count_alike_and_their_texts_by_length() -> None:
    total = summed_up([Quality(1.0, 0.0, 3.0, 3), Quality(0.5, 0.4, 1.0, 1)])
    assert total["agreement"] == 0.75
    assert total["agreement_se"] == pytest.approx(0.25)
    assert total["kl_nats"] == pytest.approx(0.2)
    assert total["perplexity"] == pytest.approx(math.e)


def test_use_is_a_share_of_tokens() -> None:
    spec = MoESpec(model_id="m", num_experts=3, top_k=2, decoder_layers=(0,))
    use_LE = use_of(torch.tensor([[[0, 1]], [[1, 2]]], dtype=torch.uint8), spec)
    assert use_LE.tolist() == [[0.5, 1.0, 0.5]]
