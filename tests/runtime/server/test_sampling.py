"""Tokens are drawn as transformers draws them."""

from typing import Any

import pytest
import torch

from runtime.server.sampling import Sampler, SamplingParams

IDS_1T = torch.tensor([[1, 2, 3]])


def draw(logits_1V: torch.Tensor, **kwargs: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**kwargs), device=torch.device("cpu"))
    return [int(sampler(IDS_1T, logits_1V)) for _ in range(200)]


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_a_temperature_of_nearly_zero_takes_the_most_probable_token(temperature: float) -> None:
    logits_1V = torch.tensor([[0.0, 1.0, 0.999, -3e38]])
    assert set(draw(logits_1V, temperature=temperature)) == {1}


def test_top_k_and_top_p_leave_only_the_probable_tokens() -> None:
    logits_1V = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert set(draw(logits_1V, seed=0)) == {0, 1, 2, 3}
    assert set(draw(logits_1V, seed=0, top_k=2)) == {0, 1}
    assert set(draw(logits_1V, seed=0, top_p=0.8)) == {0, 1, 2}
    assert set(draw(logits_1V, seed=0, top_p=0.0)) == {0}


def test_one_seed_gives_one_answer_and_another_seed_another() -> None:
    logits_1V = torch.zeros((1, 50))
    assert draw(logits_1V, seed=1) == draw(logits_1V, seed=1)
    assert draw(logits_1V, seed=1) != draw(logits_1V, seed=2)
    assert draw(logits_1V) != draw(logits_1V)


def test_half_precision_logits_are_drawn_in_float32() -> None:
    logits_1V = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().to(torch.bfloat16)
    assert draw(logits_1V, seed=3) == draw(logits_1V.float(), seed=3)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -1}],
    ids=str,
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
