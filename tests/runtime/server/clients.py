"""What tests say to a server, and how they read its answers."""

import json
from collections.abc import Callable
from typing import Any

from starlette.testclient import TestClient

from tests.runtime.server.fakes import ScriptedModel

NAME = "org/tiny"
Serve = Callable[..., TestClient]
TOOL_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "Call with <tool_call> tags.{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments.city }}</tool_call>{% endfor %};{% endfor %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def say(tokenizer: Any, text: str, **kwargs: Any) -> ScriptedModel:
    """A model that answers ``text`` and then ends."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ScriptedModel([*ids, 2], eos_id=2, **kwargs)


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"model": NAME, "prompt": "hi", **body})


def chat(client: TestClient, content: Any = "hi", **body: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **body})


def events(reply: Any) -> list[Any]:
    """The JSON of each server-sent event; checks the framing and the end."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    *lines, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error_of(reply: Any) -> dict[str, Any]:
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error
