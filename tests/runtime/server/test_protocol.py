"""What is not implemented is refused by name; what changes nothing is accepted."""

from typing import Any

import pytest
from pydantic import ValidationError

from runtime.server.protocol import ChatCompletionBody, CompletionBody, GenerationBody

COMPLETION = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BODIES: list[tuple[type[GenerationBody], dict[str, Any]]] = [
    (CompletionBody, COMPLETION),
    (ChatCompletionBody, CHAT),
]
BOTH = pytest.mark.parametrize(("kind", "minimal"), BODIES, ids=["completion", "chat"])


def refusal(kind: type[GenerationBody], body: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    (error,) = caught.value.errors()
    return str(error["loc"][-1]), error["msg"]


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 1}),
        ("min_tokens", 3),
        ("min_p", 0.1),
        ("best_off", 1),
    ],
)
def test_a_parameter_without_implementation_is_refused_by_name(
    kind: type[GenerationBody], minimal: dict[str, Any], name: str, value: Any
) -> None:
    assert refusal(kind, {**minimal, name: value})[0] == name


@pytest.mark.parametrize(
    ("name", "value"), [("logprobs", 1), ("echo", True), ("suffix", "x"), ("best_of", 2)]
)
def test_a_completion_parameter_without_implementation_is_refused(name: str, value: Any) -> None:
    assert refusal(CompletionBody, {**COMPLETION, name: value})[0] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", True),
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("reasoning_effort", "high"),
    ],
)
def test_a_chat_parameter_without_implementation_is_refused(name: str, value: Any) -> None:
    assert refusal(ChatCompletionBody, {**CHAT, name: value})[0] == name


def test_what_would_change_nothing_is_accepted() -> None:
    shared = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    CompletionBody.model_validate(
        {**COMPLETION, **shared, "best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    )
    ChatCompletionBody.model_validate(
        {
            **CHAT,
            **shared,
            "logprobs": False,
            "top_logprobs": None,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "service_tier": "auto",
            "repetition_penalty": 1.0,
        }
    )


@BOTH
def test_null_stands_for_the_default(kind: type[GenerationBody], minimal: dict[str, Any]) -> None:
    names = ("temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options")
    body = kind.model_validate({**minimal, **dict.fromkeys(names)})
    assert body == kind.model_validate(minimal)
    assert (body.temperature, body.top_p, body.n, body.stop, body.stream) == (1, 1, 1, [], False)


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", 2**63),
        ("stream", "yes"),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [1]),
        ("model", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    kind: type[GenerationBody], minimal: dict[str, Any], name: str, value: Any
) -> None:
    assert refusal(kind, {**minimal, name: value})[0] == name


@pytest.mark.parametrize(
    ("prompt", "normal"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
    ids=str,
)
def test_all_four_forms_of_a_prompt_are_read(prompt: Any, normal: Any) -> None:
    assert CompletionBody.model_validate({"model": "m", "prompt": prompt}).prompt == normal


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], 5, [1, "a"], [True], [[1], "a"], [1.5], {}, ["a", [1]]], ids=str
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    name, message = refusal(CompletionBody, {"model": "m", "prompt": prompt})
    assert name == "prompt"
    assert "a list of token ids" in message


def test_half_a_surrogate_pair_is_refused() -> None:
    name, message = refusal(CompletionBody, {"model": "m", "prompt": "ok \ud83c"})
    assert (name, "surrogate" in message) == ("prompt", True)


def content_of(content: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return ChatCompletionBody.model_validate(body).messages[0].content


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert content_of(parts) == content_of("a\nb") == "a\nb"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
        ([{"type": "text"}], "keys type and text"),
        ([{"type": "text", "text": 1}], "keys type and text"),
        (["a"], "type None"),
        (None, "must be a string"),
        (1, "must be a string"),
    ],
    ids=str,
)
def test_other_content_is_refused(content: Any, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        content_of(content)


def test_a_message_that_the_client_library_dumped_is_accepted() -> None:
    """A conversation goes on with the last answer's ``message.model_dump()``, full of nulls."""
    dumped = {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    ChatCompletionBody.model_validate({"model": "m", "messages": [dumped]})


def test_a_tool_call_in_a_message_is_refused_by_name() -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}
    assert refusal(ChatCompletionBody, {"model": "m", "messages": [message]})[0] == "tool_calls"
