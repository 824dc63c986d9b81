"""``/v1/responses``: the object, the events, and what is refused."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.runtime.server.clients import CALL, NAME, Serve, chat, error_of, say
from tests.runtime.server.fakes import ScriptedModel


def respond(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/responses", json={"model": NAME, "input": "hi", **body})


def named_events(reply: Any) -> list[tuple[str, dict[str, Any]]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = reply.text.split("\n\n")
    assert rest == ""
    found = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert content["type"] == name.removeprefix("event: ")
        assert content["sequence_number"] == number
        found.append((content["type"], content))
    return found


def test_a_response_has_all_that_clients_read(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "Hello!"))
    reply = respond(client, metadata={"run": "1"}, temperature=0.5).json()
    assert reply["id"].startswith("resp_")
    assert (reply["object"], reply["status"], reply["model"]) == ("response", "completed", NAME)
    (item,) = reply["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert [(part["type"], part["text"]) for part in item["content"]] == [("output_text", "Hello!")]
    assert (reply["metadata"], reply["temperature"]) == ({"run": "1"}, 0.5)
    usage, as_chat = reply["usage"], chat(client).json()["usage"]
    assert usage["input_tokens"] == as_chat["prompt_tokens"]
    assert usage["output_tokens"] == as_chat["completion_tokens"]
    assert usage["total_tokens"] == as_chat["total_tokens"]


def test_an_answer_that_is_cut_is_incomplete(serve: Serve) -> None:
    reply = respond(serve(ScriptedModel([20])), max_output_tokens=3).json()
    assert reply["status"] == reply["output"][0]["status"] == "incomplete"
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
    assert reply["usage"]["output_tokens"] == 3


def test_the_events_of_a_stream_are_openais_and_join_to_the_whole(
    serve: Serve, tokenizer: Any
) -> None:
    client = serve(say(tokenizer, "Grüße 世界"))
    whole = respond(client).json()
    said = named_events(respond(client, stream=True))
    names = [name for name, _ in said]
    num_tokens = whole["usage"]["output_tokens"]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_tokens,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for name, event in said if name.endswith("text.delta")]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"] == "Grüße 世界"
    last = said[-1][1]["response"]
    assert last["usage"] == whole["usage"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert said[0][1]["response"]["status"] == "in_progress"


def test_a_failure_within_a_stream_is_an_event(serve: Serve) -> None:
    client = serve(ScriptedModel([20], broken={3: RuntimeError("no memory")}))
    name, last = named_events(respond(client, stream=True))[-1]
    assert (name, last["response"]["status"]) == ("response.failed", "failed")
    assert "no memory" in last["response"]["error"]["message"]


def test_instructions_and_messages_are_one_conversation(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "yes"))
    first = respond(client).json()
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        first["output"][0],  # given back as it came
        {"type": "message", "role": "user", "content": "and now?"},
    ]
    reply = respond(client, input=turns, instructions="Be brief.").json()
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and now?"},
    ]
    rendered = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert reply["usage"]["input_tokens"] == len(ids)
    assert reply["instructions"] == "Be brief."


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "name": "f", "strict": True}]}, "tools[0].strict"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"max_output_tokens": 4096}, "input"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"n": 2}, "n"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(
    tiny: TestClient, body: dict[str, Any], param: str
) -> None:
    reply = respond(tiny, **body)
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param


def test_what_would_change_nothing_is_accepted(tiny: TestClient) -> None:
    reply = respond(
        tiny,
        store=False,
        tools=[],
        text={"format": {"type": "text"}},
        truncation="disabled",
        previous_response_id=None,
        max_output_tokens=1,
    )
    assert reply.status_code == 200


TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def test_calls_are_items_of_their_own(serve: Serve, with_tools: Any) -> None:
    client = serve(say(with_tools, f"Sure.\n{CALL}"), tokenizer=with_tools)
    whole = respond(client, tools=[TOOL]).json()
    text, call = whole["output"]
    assert (text["type"], text["content"][0]["text"]) == ("message", "Sure.")
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Köln"}
    assert call["call_id"].startswith("call_")
    assert [tool["name"] for tool in whole["tools"]] == ["weather"]

    said = named_events(respond(client, tools=[TOOL], stream=True))
    names = [name for name, _ in said if not name.endswith("output_text.delta")]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    indices = [event["output_index"] for _, event in said if "output_index" in event]
    assert indices == sorted(indices)
    last = said[-1][1]["response"]["output"]
    assert [item["type"] for item in last] == ["message", "function_call"]
    assert last[1]["arguments"] == call["arguments"]


def test_a_call_without_a_text_is_the_only_item(serve: Serve, with_tools: Any) -> None:
    client = serve(say(with_tools, CALL), tokenizer=with_tools)
    (call,) = respond(client, tools=[TOOL]).json()["output"]
    assert call["type"] == "function_call"
    (text,) = respond(client, tools=[TOOL], tool_choice="none").json()["output"]
    assert text["content"][0]["text"] == CALL


def test_a_conversation_goes_on_with_what_a_call_gave(serve: Serve, with_tools: Any) -> None:
    client = serve(say(with_tools, CALL), tokenizer=with_tools)
    first = respond(client, tools=[TOOL]).json()["output"][0]
    given = {"type": "function_call_output", "call_id": first["call_id"], "output": "rain"}
    turns = [{"role": "user", "content": "hi"}, first, given]
    reply = respond(client, input=turns, tools=[TOOL]).json()
    called = [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": called},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    as_chat_tool = {"type": "function", "function": {"name": "weather"}}
    as_chat = {"messages": messages, "tools": [as_chat_tool]}
    count = client.post("/tokenize", json=as_chat).json()["count"]
    assert reply["usage"]["input_tokens"] == count
