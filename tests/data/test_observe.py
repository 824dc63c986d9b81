from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from data.adapters import moe_layers, probs_kind
from data.observe import RouterRecorder, continue_batch, sample
from tests.families import FAMILIES, tiny_model

PROMPTS = [[5, 9, 23, 41, 7, 77, 12], [3, 99], [64, 2, 17, 31, 31]]
NO_EOS: list[int] = []


def hooks_of(model: PreTrainedModel) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


def experts_used_TLK(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """What reached the experts modules in one plain forward of one request, without our hooks."""
    seen: list[torch.Tensor] = []
    handles = [
        moe.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
        for moe in moe_layers(model)
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen, dim=1)


def rows_of(number: int, num_decoded: int) -> list[int]:
    width = max(map(len, PROMPTS))
    prefill = range((number + 1) * width - len(PROMPTS[number]), (number + 1) * width)
    first = len(PROMPTS) * width + number
    return [*prefill, *range(first, first + num_decoded * len(PROMPTS), len(PROMPTS))]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_experts_are_those_that_ran(family: str) -> None:
    """Left-padded, batched and cached against one plain forward of each request alone."""
    model = tiny_model(family)
    with RouterRecorder(model, keep_router_probs=True) as recorder:
        generated = continue_batch(model, PROMPTS, max_new_tokens=4, eos_token_ids=NO_EOS)
        routing = recorder.take()
    assert routing.router_probs_NLE is not None
    for number, (prompt, new_ids) in enumerate(zip(PROMPTS, generated, strict=True)):
        rows = rows_of(number, len(new_ids) - 1)
        expected_TLK = experts_used_TLK(model, [*prompt, *new_ids[:-1]])
        ids_TLK = routing.ids_NLK[rows].long()
        torch.testing.assert_close(ids_TLK.sort(-1).values, expected_TLK.sort(-1).values)
        probs_TLE = routing.router_probs_NLE[rows]
        torch.testing.assert_close(probs_TLE.gather(-1, ids_TLK), routing.probs_NLK[rows])
        torch.testing.assert_close(
            probs_TLE.float().sum(-1), torch.ones(probs_TLE.shape[:2]), atol=2e-3, rtol=0
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_recorded_probabilities_are_the_softmax_of_output_router_logits(family: str) -> None:
    model = tiny_model(family)
    assert probs_kind(model) == "softmax"
    with RouterRecorder(model, keep_router_probs=True) as recorder:
        continue_batch(model, PROMPTS[:1], max_new_tokens=0, eos_token_ids=NO_EOS)
        routing = recorder.take()
    with torch.inference_mode():
        output = model(input_ids=torch.tensor(PROMPTS[:1]), output_router_logits=True)
    expected_TLE = torch.stack(output.router_logits, dim=1).softmax(-1)
    torch.testing.assert_close(routing.router_probs_NLE, expected_TLE.half(), atol=1e-3, rtol=0)
    top_K = model.config.num_experts_per_tok
    expected_TLK = expected_TLE.topk(top_K, dim=-1)
    assert torch.equal(routing.ids_NLK.long(), expected_TLK.indices)
    torch.testing.assert_close(routing.probs_NLK, expected_TLK.values.half(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_that_of_transformers(family: str) -> None:
    model = tiny_model(family)
    ours = continue_batch(model, PROMPTS, max_new_tokens=6, eos_token_ids=NO_EOS)
    for prompt, new_ids in zip(PROMPTS, ours, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert new_ids == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_request_is_the_same_alone_and_in_any_batch(temperature: float) -> None:
    model = tiny_model("qwen3_moe")
    arguments: dict[str, Any] = {
        "max_new_tokens": 5,
        "eos_token_ids": NO_EOS,
        "temperature": temperature,
        "top_p": 0.9,
    }
    together = continue_batch(model, PROMPTS, seeds=["a", "b", "c"], **arguments)
    reverse = continue_batch(model, PROMPTS[::-1], seeds=["c", "b", "a"], **arguments)
    assert together == reverse[::-1]
    for prompt, seed, expected in zip(PROMPTS, "abc", together, strict=True):
        assert continue_batch(model, [prompt], seeds=[seed], **arguments) == [expected]


def test_positions_count_from_each_requests_own_first_token() -> None:
    """Rotary positions are relative, so that only a look at them tells."""
    model = tiny_model("qwen3_moe")
    seen: list[list[list[int]]] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    continue_batch(model, [[7, 8, 9], [5]], max_new_tokens=3, eos_token_ids=NO_EOS)
    assert [seen[0][0], seen[0][1][-1:]] == [[0, 1, 2], [0]]
    assert seen[1:] == [[[3], [1]], [[4], [2]]]


def test_another_seed_draws_other_tokens() -> None:
    model = tiny_model("qwen3_moe")
    one, two = continue_batch(
        model,
        [PROMPTS[0], PROMPTS[0]],
        max_new_tokens=12,
        eos_token_ids=NO_EOS,
        temperature=2.0,
        seeds=["0:x", "1:x"],
    )
    assert one != two


def test_a_request_ends_with_its_end_token_and_others_go_on() -> None:
    model = tiny_model("qwen3_moe")
    free = continue_batch(model, PROMPTS, max_new_tokens=6, eos_token_ids=NO_EOS)
    eos = next(token for token in free[0] if all(token not in ids for ids in free[1:]))
    stopped = continue_batch(model, PROMPTS, max_new_tokens=6, eos_token_ids=[eos])
    assert stopped[0] == free[0][: free[0].index(eos) + 1]
    assert stopped[1:] == free[1:]


@pytest.mark.parametrize(("max_new_tokens", "forwards"), [(0, 1), (1, 1), (3, 3)])
def test_the_last_generated_token_is_not_routed(max_new_tokens: int, forwards: int) -> None:
    model = tiny_model("qwen3_moe")
    with RouterRecorder(model, keep_router_probs=False) as recorder:
        generated = continue_batch(
            model, PROMPTS[:1], max_new_tokens=max_new_tokens, eos_token_ids=NO_EOS
        )
        routing = recorder.take()
    assert len(generated[0]) == max_new_tokens
    assert len(routing.ids_NLK) == len(PROMPTS[0]) + forwards - 1
    assert routing.router_probs_NLE is None


def test_many_experts_are_recorded_as_int16() -> None:
    model = tiny_model("qwen3_moe", num_experts=300)
    with RouterRecorder(model, keep_router_probs=False) as recorder:
        continue_batch(model, PROMPTS, max_new_tokens=1, eos_token_ids=NO_EOS)
        ids_NLK = recorder.take().ids_NLK
    assert ids_NLK.dtype == torch.int16
    assert ids_NLK.max() > 255


def test_hooks_are_gone_and_outputs_equal_after_recording() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.tensor(PROMPTS[:1])
    attributes = [set(vars(module)) for module in model.modules()]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    with RouterRecorder(model, keep_router_probs=True):
        assert sum(hooks_of(model)) == model.config.num_hidden_layers
        with torch.inference_mode():
            during = model(input_ids=ids).logits
    with torch.inference_mode():
        after = model(input_ids=ids).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not any(hooks_of(model))
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_hooks_are_gone_after_an_exception() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(IndexError), RouterRecorder(model, keep_router_probs=False):
        continue_batch(model, [[10**6]], max_new_tokens=1, eos_token_ids=NO_EOS)
    assert not any(hooks_of(model))


def test_taking_from_an_incomplete_forward_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    with RouterRecorder(model, keep_router_probs=False) as recorder:
        with pytest.raises(RuntimeError, match="0 forwards are complete"):
            recorder.take()
        moe_layers(model)[1].router(torch.zeros(1, 32))
        with pytest.raises(RuntimeError, match="1 of 3 routers"):
            recorder.take()
        with pytest.raises(RuntimeError, match="MoE layer 1 ran twice"):
            moe_layers(model)[1].router(torch.zeros(1, 32))


def test_samples_follow_the_tempered_distribution() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, -1.0])
    num_draws = 2000
    uniforms_B = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    drawn_B = sample(logits_V.expand(num_draws, -1), uniforms_B, temperature=0.5, top_p=1.0)
    shares_V = drawn_B.bincount(minlength=4) / num_draws
    torch.testing.assert_close(shares_V, (logits_V / 0.5).softmax(-1), atol=1e-3, rtol=0)


def test_top_p_keeps_the_smallest_likely_set() -> None:
    probs_V = torch.tensor([0.1, 0.5, 0.15, 0.25])
    uniforms_B = torch.tensor(
        [0.0, 0.3, 0.66, 0.67, 0.8, 0.999999, 1 - 2**-53], dtype=torch.float64
    )
    logits_BV = probs_V.log().expand(len(uniforms_B), -1)
    for top_p, kept in [(0.4, {1}), (0.7, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})]:
        drawn_B = sample(logits_BV, uniforms_B, temperature=1.0, top_p=top_p)
        assert set(drawn_B.tolist()) == kept, top_p
    assert sample(logits_BV, uniforms_B, temperature=1.0, top_p=0.7).tolist() == [
        1,
        1,
        1,
        3,
        3,
        3,
        3,
    ]


def test_sampling_without_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature=1"):
        continue_batch(
            tiny_model("qwen3_moe"), PROMPTS, max_new_tokens=1, eos_token_ids=[], temperature=1.0
        )
