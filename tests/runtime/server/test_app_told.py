"""What an answer tells beside its text: probabilities, the prompt, the routing."""

from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from tests.runtime.server.clients import Serve, chat, complete, error_of, events, say
from tests.runtime.server.fakes import ScriptedModel

PROMPT = "Dear customer, your booking"


def log_softmax(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)  # type: ignore[no-any-return]


def test_a_loglikelihood_is_asked_for_as_lm_eval_asks(
    tiny: TestClient, model: Any, tokenizer: Any
) -> None:
    """Token ids, echo, one token, one logprob; what follows the context is summed and compared."""
    contexts, continuations = ["The weather", "def add(a, b):"], [" in the", " return a"]
    prompts = [
        tokenizer(context).input_ids + tokenizer(continuation, add_special_tokens=False).input_ids
        for context, continuation in zip(contexts, continuations, strict=True)
    ]
    reply = complete(
        tiny, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    ).json()
    for choice, ids, context in zip(reply["choices"], prompts, contexts, strict=True):
        start = len(tokenizer(context).input_ids)
        told = choice["logprobs"]
        logprobs_TV = log_softmax(model, ids)
        expected = [float(logprobs_TV[i - 1, ids[i]]) for i in range(start, len(ids))]
        assert told["token_logprobs"][start:-1] == pytest.approx(expected, abs=1e-4)
        is_greedy = [max(top.values()) for top in told["top_logprobs"][start:-1]]
        assert is_greedy == pytest.approx(logprobs_TV[start - 1 : -1].max(-1).values, abs=1e-4)
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert len(told["tokens"]) == len(told["text_offset"]) == len(ids) + 1


def test_zero_tokens_with_echo_give_the_prompts_probabilities_alone(
    tiny: TestClient, tokenizer: Any
) -> None:
    one = complete(tiny, prompt=PROMPT, max_tokens=1, logprobs=2, echo=True).json()
    none = complete(tiny, prompt=PROMPT, max_tokens=0, logprobs=2, echo=True).json()
    (choice,) = none["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert none["usage"]["completion_tokens"] == 0
    told = one["choices"][0]["logprobs"]
    assert choice["logprobs"] == {name: values[:-1] for name, values in told.items()}
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer(PROMPT).input_ids)
    assert complete(tiny, prompt=PROMPT, max_tokens=0, echo=True, logprobs=None).status_code == 200


def test_echo_repeats_the_prompt_in_front_of_every_choice(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, " there"))
    ids = tokenizer("hello", add_special_tokens=False).input_ids
    for prompt, text in (("hello", "hello"), (ids, "hello"), (["a", "b"], "a")):
        reply = complete(client, prompt=prompt, echo=True, n=2).json()
        assert reply["choices"][0]["text"] == reply["choices"][1]["text"] == f"{text} there"
        assert reply["choices"][0]["logprobs"] is None


def test_a_stream_with_echo_and_logprobs_joins_to_the_whole(tiny: TestClient) -> None:
    ask = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": True}
    (whole,) = complete(tiny, **ask).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(complete(tiny, stream=True, **ask))]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert whole["text"].startswith(PROMPT)
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


def test_offsets_point_at_the_text_that_a_token_brought(serve: Serve, tokenizer: Any) -> None:
    text = " a 世界 🎉 end"
    client = serve(say(tokenizer, text))
    (choice,) = complete(client, prompt="hé", max_tokens=50, logprobs=0, echo=True).json()[
        "choices"
    ]
    told = choice["logprobs"]
    offsets = told["text_offset"]
    assert choice["text"] == f"hé{text}"
    assert offsets == sorted(offsets)
    for token, offset in zip(told["tokens"], offsets, strict=True):
        if token.isascii() and not token.startswith("<"):
            assert choice["text"][offset:].startswith(token)


def test_a_completions_logprobs_name_the_token_and_the_best_ones(
    tiny: TestClient, model: Any, tokenizer: Any
) -> None:
    ask = {"prompt": PROMPT, "max_tokens": 4, "seed": 1, "temperature": 1.5, "logprobs": 3}
    (choice,) = complete(tiny, **ask).json()["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    ids = tokenizer(PROMPT).input_ids + [
        token_id
        for token in told["tokens"]
        for token_id in tokenizer(token, add_special_tokens=False).input_ids
    ]
    logprobs_TV = log_softmax(model, ids)[-5:-1]
    assert told["token_logprobs"] == pytest.approx(
        [float(row[token_id]) for row, token_id in zip(logprobs_TV, ids[-4:], strict=True)],
        abs=1e-4,
    )
    for token, logprob, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert 3 <= len(top) <= 4


def test_a_chats_logprobs_have_bytes(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "Grüße"))
    (choice,) = chat(client, logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    *texts, _ = [token["token"] for token in content]  # the last ends the sequence
    assert len(content) > 2
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in content)
    assert content[0]["top_logprobs"][0]["token"] == texts[0]
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"]
    chunks = events(chat(client, logprobs=True, top_logprobs=2, stream=True))
    streamed = [t for c in chunks for t in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert chat(client).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("ask", [complete, chat])
def test_the_routing_is_vllms_arrays(tiny: TestClient, model: Any, ask: Any) -> None:
    reply = ask(tiny, max_tokens=3, ignore_eos=True, return_routed_experts=True).json()
    prompt, answer = reply["prompt_routed_experts"], reply["choices"][0]["routed_experts"]
    assert len(prompt) == reply["usage"]["prompt_tokens"]
    assert len(answer) == 2  # the last token was never read
    config = model.config
    for rows in (prompt, answer):
        assert {len(row) for row in rows} == {config.num_hidden_layers}
        assert {len(ids) for row in rows for ids in row} == {config.num_experts_per_tok}
        assert {0 <= e < config.num_experts for row in rows for ids in row for e in ids} == {True}
    unasked = ask(tiny, max_tokens=1).json()
    assert "prompt_routed_experts" not in unasked
    assert "routed_experts" not in unasked["choices"][0]


def test_an_engine_that_cannot_tell_the_routing_refuses_by_name(serve: Serve) -> None:
    reply = complete(serve(ScriptedModel([20])), return_routed_experts=True)
    assert reply.status_code == 400
    error = error_of(reply)
    assert (error["param"], error["code"]) == ("return_routed_experts", "unsupported_parameter")


def test_penalties_biases_and_min_tokens_reach_the_engine(tiny: TestClient) -> None:
    base = {"prompt": "The weather", "temperature": 0, "max_tokens": 24}
    plain = complete(tiny, **base).json()["choices"][0]["text"]
    for changes in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 3.0},
    ):
        assert complete(tiny, **base, **changes).json()["choices"][0]["text"] != plain
    biased = complete(tiny, **{**base, "max_tokens": 3}, logit_bias={"300": 100}, logprobs=0).json()
    assert len(set(biased["choices"][0]["logprobs"]["tokens"])) == 1
    assert complete(tiny, **base, min_p=1.0, temperature_=None).status_code == 400


def test_min_tokens_hold_the_end_back(serve: Serve, tokenizer: Any) -> None:
    client = serve(ScriptedModel([20, 2], eos_id=2))
    assert complete(client).json()["usage"]["completion_tokens"] == 2
    reply = complete(client, min_tokens=5, temperature=0).json()
    assert reply["usage"]["completion_tokens"] == 6
    assert reply["choices"][0]["finish_reason"] == "stop"
