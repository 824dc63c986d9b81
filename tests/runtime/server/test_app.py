"""The routes that answer, through Starlette's test client."""

from typing import Any

from starlette.testclient import TestClient

from tests.runtime.server.clients import NAME, Serve, chat, complete, events, say
from tests.runtime.server.fakes import (
    ScriptedModel,
)


def test_a_completion_has_all_that_clients_read(serve: Serve, tokenizer: Any) -> None:
    reply = complete(serve(say(tokenizer, " there")), max_tokens=50).json()
    assert reply.pop("id").startswith("cmpl-")
    assert isinstance(reply.pop("created"), int)
    usage = reply.pop("usage")
    assert reply == {
        "object": "text_completion",
        "model": NAME,
        "choices": [{"index": 0, "text": " there", "logprobs": None, "finish_reason": "stop"}],
    }
    num_prompt = len(tokenizer("hi").input_ids)
    assert usage["prompt_tokens"] == num_prompt
    assert usage["total_tokens"] == num_prompt + usage["completion_tokens"]


def test_a_chat_completion_has_all_that_clients_read(serve: Serve, tokenizer: Any) -> None:
    reply = chat(serve(say(tokenizer, "Hello!"))).json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello!", "refusal": None}
    assert choice["finish_reason"] == "stop"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert reply["usage"]["prompt_tokens"] == len(rendered)


UNICODE = "Grüße 世界 🎉👩‍👩‍👧!"


def test_a_stream_has_one_chunk_per_token_and_joins_to_the_whole(
    serve: Serve, tokenizer: Any
) -> None:
    client = serve(say(tokenizer, UNICODE))
    whole = complete(client, max_tokens=100).json()
    chunks = events(complete(client, max_tokens=100, stream=True))
    assert len(chunks) == whole["usage"]["completion_tokens"]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == whole["choices"][0]["text"] == UNICODE
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_a_chat_stream_names_the_role_once(serve: Serve, tokenizer: Any) -> None:
    chunks = events(chat(serve(say(tokenizer, UNICODE)), stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta["content"] for delta in deltas) == UNICODE
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_usage_comes_last_and_without_choices(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "Hello!"))
    for ask in (complete, chat):
        whole = ask(client, max_tokens=100).json()
        *chunks, last = events(
            ask(client, max_tokens=100, stream=True, stream_options={"include_usage": True})
        )
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
        assert len(chunks) == last["usage"]["completion_tokens"]


def test_usage_so_far_comes_with_each_chunk_if_wanted(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "Hello!"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(complete(client, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == list(range(1, len(chunks) + 1))
    assert last["usage"] == chunks[-1]["usage"]


def test_stream_and_whole_agree_on_the_embedded_model(tiny: TestClient) -> None:
    asks = [{"temperature": 0}, {"seed": 3, "temperature": 0.9}, {"temperature": 0, "stop": "e"}]
    for options in asks:
        whole = complete(tiny, prompt="The weather", max_tokens=8, **options).json()
        chunks = events(complete(tiny, prompt="The weather", max_tokens=8, stream=True, **options))
        texts = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert texts == whole["choices"][0]["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_every_form_of_a_prompt_gives_the_same_answer(tiny: TestClient, tokenizer: Any) -> None:
    ids = tokenizer("The weather").input_ids
    options = {"max_tokens": 5, "temperature": 0}
    prompts = ["The weather", ["The weather"], ids, [ids]]
    answers = [complete(tiny, prompt=prompt, **options).json() for prompt in prompts]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(ids)}


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(
    tiny: TestClient, tokenizer: Any
) -> None:
    def ask(**body: Any) -> Any:
        return complete(tiny, max_tokens=4, seed=5, temperature=1.5, **body).json()

    both = ask(prompt=["One", "Two"], n=2)
    alone = [ask(prompt="One", n=2), ask(prompt="Two", n=2)]
    texts = [choice["text"] for choice in both["choices"]]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert texts == [choice["text"] for answer in alone for choice in answer["choices"]]
    assert texts[0] != texts[1]  # one seed, but not one answer
    num_read = sum(len(tokenizer(prompt).input_ids) for prompt in ("One", "Two"))
    assert both["usage"]["prompt_tokens"] == num_read  # not once per choice
    assert both["usage"]["completion_tokens"] == 16


def test_choices_are_streamed_under_their_index(serve: Serve, tokenizer: Any) -> None:
    chunks = events(chat(serve(say(tokenizer, "yes")), n=2, stream=True))
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == "yes"


def test_max_completion_tokens_wins_over_max_tokens(serve: Serve, tokenizer: Any) -> None:
    client = serve(ScriptedModel([20]))
    reply = chat(client, max_tokens=9, max_completion_tokens=3).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"
    assert chat(client, max_tokens=9).json()["usage"]["completion_tokens"] == 9
    assert complete(client).json()["usage"]["completion_tokens"] == 16  # OpenAI's default
