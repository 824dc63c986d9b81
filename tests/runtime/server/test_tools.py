"""Tool calls are found in the text, wherever the pieces end, and nothing of the text is lost."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.server.tools import ToolCallReader, tool_obstacle
from tests.runtime.server.clients import (
    CALL,
    NAME,
    TOOL_TEMPLATE,
    Serve,
    chat,
    error_of,
    events,
    say,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolCallReader(reads=True)
    said = [*map(reader.push, pieces), reader.finish()]
    calls = [call for _, calls in said for call in calls]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    text = "".join(text for text, _ in said)
    return text, [(call.function.name, call.function.arguments) for call in calls]


KOELN = ("weather", '{"city": "Köln"}')


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (f"Let me see.\n{CALL}", "Let me see.", [KOELN]),
        (f"{CALL}\n{CALL}\n", "", [KOELN, KOELN]),
        (f"{CALL}\n\nand so on, and on \n", "and so on, and on \n", [KOELN]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
        ("<tool_call>not json</tool_call> x", "<tool_call>not json</tool_call> x", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('a <tool_call>{"name": "f"', 'a<tool_call>{"name": "f"', []),
        ("a < b and <tool", "a < b and <tool", []),
        ("plain  text\n", "plain  text\n", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_leave_the_text(
    text: str, shown: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert read([text[at : at + size] for at in range(0, len(text), size)]) == (shown, calls)


@given(pieces=st.lists(st.text("<tol_ca>/{} \n", max_size=6)))
def test_without_a_whole_call_every_character_is_shown(pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, calls = read(pieces)
    assert calls == []
    assert shown.replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")


def test_who_does_not_read_passes_everything_on() -> None:
    reader = ToolCallReader(reads=False)
    assert reader.push(CALL) == (CALL, [])
    assert reader.finish() == ("", [])


def test_the_obstacle_is_named(tokenizer: Any, with_tools: Any) -> None:
    assert tool_obstacle(with_tools) is None
    assert "has no tools" in str(tool_obstacle(tokenizer))
    for template, complaint in (
        (None, "no chat template"),
        ("{{ tools }}", "cannot read"),
        ("{{ tools }}<tool_call><function=x>", "cannot read"),
        ({"default": "x", "tool_use": TOOL_TEMPLATE}, "None"),
        ("{% unknown_tag %} tools <tool_call>", "None"),
    ):
        with_tools.chat_template = template
        assert complaint in str(tool_obstacle(with_tools))


def test_an_answer_with_a_call_is_openais(serve: Serve, with_tools: Any) -> None:
    client = serve(say(with_tools, f"Sure.\n{CALL}"), tokenizer=with_tools)
    (choice,) = chat(client, tools=[WEATHER]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Sure."
    (call,) = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    arguments = json.loads(call["function"].pop("arguments"))
    assert (call, arguments) == (
        {"type": "function", "function": {"name": "weather"}},
        {"city": "Köln"},
    )


def test_a_stream_with_a_call_has_one_chunk_per_token_and_the_call_whole(
    serve: Serve, with_tools: Any
) -> None:
    client = serve(say(with_tools, f"Sure.\n{CALL}"), tokenizer=with_tools)
    whole = chat(client, tools=[WEATHER]).json()
    chunks = [chunk["choices"][0] for chunk in events(chat(client, tools=[WEATHER], stream=True))]
    assert len(chunks) == whole["usage"]["completion_tokens"]
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == "Sure."
    (calls,) = [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert (calls[0]["index"], calls[0]["function"]["name"]) == (0, "weather")
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_the_model_is_shown_its_tools_unless_none_may_be_called(
    serve: Serve, with_tools: Any
) -> None:
    client = serve(say(with_tools, CALL), tokenizer=with_tools)
    shown = chat(client, tools=[WEATHER]).json()
    hidden = chat(client, tools=[WEATHER], tool_choice="none").json()
    assert shown["usage"]["prompt_tokens"] > hidden["usage"]["prompt_tokens"]
    assert hidden["choices"][0]["message"]["content"] == CALL
    assert "tool_calls" not in hidden["choices"][0]["message"]


def test_a_conversation_goes_on_after_a_call(serve: Serve, with_tools: Any) -> None:
    client = serve(say(with_tools, CALL), tokenizer=with_tools)
    first = chat(client, tools=[WEATHER]).json()["choices"][0]["message"]
    messages = [
        {"role": "user", "content": "hi"},
        first,
        {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "rain"},
    ]
    reply = client.post("/tokenize", json={"messages": messages, "return_token_strs": True})
    text = with_tools.decode(reply.json()["tokens"])
    assert text == "user:hi;assistant:<tool_call>weatherKöln</tool_call>;tool:rain;"
    body = {"model": NAME, "messages": messages, "tools": [WEATHER]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_tools_without_a_template_for_them_are_refused_by_name(
    serve: Serve, tokenizer: Any
) -> None:
    client = serve(say(tokenizer, "x"))
    called = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    turn = {"role": "assistant", "content": None, "tool_calls": called}
    for body, param in (
        ({"tools": [WEATHER]}, "tools"),
        ({"messages": [{"role": "user", "content": "hi"}, turn]}, "messages"),
    ):
        reply = chat(client, **body)
        assert reply.status_code == 400
        error = error_of(reply)
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
        assert "has no tools" in error["message"]
