"""Tokens are drawn as transformers draws them."""

from typing import Any

import pytest
import torch

from runtime.server.sampling import Sampler, SamplingParams, token_logprobs

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
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": float("inf")},
        {"presence_penalty": float("nan")},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"min_tokens": -1},
        {"num_logprobs": -1},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def next_id(logits: list[float], *, ids: list[int], **kwargs: Any) -> int:
    """The greedy choice after ``ids``, of which the first two are the prompt."""
    params = SamplingParams(temperature=0.0, **kwargs)
    sampler = Sampler(params, device=torch.device("cpu"), num_prompt_tokens=2, eos_ids=[3])
    return int(sampler(torch.tensor([ids]), torch.tensor([logits])))


def test_min_p_drops_what_is_much_less_probable_than_the_best() -> None:
    logits_1V = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert set(draw(logits_1V, seed=0, min_p=0.4)) == {0, 1}
    assert set(draw(logits_1V, seed=0, min_p=0.15)) == {0, 1, 2, 3}


def test_frequency_counts_and_presence_does_not_and_the_prompt_is_spared() -> None:
    logits = [1.0, 1.25, 0.0, 0.0]
    assert next_id(logits, ids=[1, 1], frequency_penalty=2.0, presence_penalty=2.0) == 1
    assert next_id(logits, ids=[0, 0, 1], frequency_penalty=0.2) == 1
    assert next_id(logits, ids=[0, 0, 1, 1], frequency_penalty=0.2) == 0
    assert next_id(logits, ids=[0, 0, 1, 1], presence_penalty=0.2) == 1
    assert next_id(logits, ids=[0, 0, 1], presence_penalty=0.3) == 0


def test_the_repetition_penalty_counts_the_prompt_too() -> None:
    assert next_id([1.0, 1.25, 0.0, 0.0], ids=[1, 2], repetition_penalty=1.5) == 0
    assert next_id([-1.0, -0.9, -9.0, -9.0], ids=[1, 2], repetition_penalty=1.5) == 0


def test_a_bias_moves_the_choice_and_may_forbid_a_token() -> None:
    assert next_id([1.0, 0.0, 0.0, 0.0], ids=[2, 2], logit_bias={2: 1.5}) == 2
    assert next_id([1.0, 0.5, 0.0, 0.0], ids=[2, 2], logit_bias={0: -100.0}) == 1


def test_the_end_of_the_sequence_waits_for_min_tokens() -> None:
    logits = [1.0, 0.0, 0.0, 5.0]
    assert next_id(logits, ids=[2, 2, 2], min_tokens=2) == 0
    assert next_id(logits, ids=[2, 2, 2, 2], min_tokens=2) == 3


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits_1V = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    params = SamplingParams(temperature=0.1, top_k=1, logit_bias={0: -100.0}, num_logprobs=2)
    sampler = Sampler(params, device=torch.device("cpu"))
    token_id = int(sampler(IDS_1T, logits_1V))
    told = sampler.logprobs(token_id, logits_1V)
    assert told is not None
    assert (told.token_id, [token for token, _ in told.top]) == (1, [0, 1])
    assert [logprob for _, logprob in told.top] == pytest.approx(
        torch.tensor([0.5, 0.25]).log().tolist()
    )
    assert told.logprob == told.top[1][1]
    assert Sampler(SamplingParams(), device=torch.device("cpu")).logprobs(1, logits_1V) is None


def test_logprobs_of_many_tokens_are_those_of_each() -> None:
    torch.manual_seed(0)
    logits_TV = torch.randn(300, 7)
    ids = torch.randint(0, 7, (300,)).tolist()
    together = token_logprobs(ids, logits_TV, num_top=3)
    expected_TV = logits_TV.log_softmax(-1)
    assert [told.token_id for told in together] == ids
    assert [told.logprob for told in together] == pytest.approx(
        [float(expected_TV[i, token_id]) for i, token_id in enumerate(ids)]
    )
    best = expected_TV.topk(3).indices.tolist()
    assert [[token for token, _ in told.top] for told in together] == best
    assert token_logprobs(ids[:1], logits_TV[:1], num_top=99)[0].top[6][1] == pytest.approx(
        float(expected_TV[0].min())
    )
