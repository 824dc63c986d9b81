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
        ("best_off", 1),
        ("guided_json", {}),
        ("prompt_logprobs", 1),
        ("truncate_prompt_tokens", 5),
    ],
)
def test_a_parameter_without_implementation_is_refused_by_name(
    kind: type[GenerationBody], minimal: dict[str, Any], name: str, value: Any
) -> None:
    assert refusal(kind, {**minimal, name: value})[0] == name


@pytest.mark.parametrize(
    ("name", "value"), [("suffix", "x"), ("best_of", 2), ("best_of", True), ("suffix", 0)]
)
def test_a_completion_parameter_without_implementation_is_refused(name: str, value: Any) -> None:
    assert refusal(CompletionBody, {**COMPLETION, name: value})[0] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
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
        ("max_tokens", 1.5),
        ("seed", 2**63),
        ("stream", "yes"),
        ("stop", ["a"] * 17),
        ("frequency_penalty", 2.1),
        ("presence_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
        ("min_p", 1.1),
        ("min_tokens", -1),
        ("top_k", -2),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", [5]),
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


def test_a_turn_may_be_nothing_but_tool_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = ChatCompletionBody.model_validate({"model": "m", "messages": [message]})
    assert body.messages[0].content is None
    broken = {**message, "content": "x", "tool_calls": [{"id": "1"}]}
    assert refusal(ChatCompletionBody, {"model": "m", "messages": [broken]})[0] == "function"


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionBody, {**COMPLETION, "max_tokens": 0}, "max_tokens"),
        (CompletionBody, {**COMPLETION, "stream_options": {}}, "stream_options"),
        (CompletionBody, {**COMPLETION, "return_routed_experts": True, "stream": True}, "return"),
        (CompletionBody, {**COMPLETION, "return_routed_experts": True, "prompt": ["a", "b"]}, "1"),
        (ChatCompletionBody, {**CHAT, "top_logprobs": 2}, "logprobs=true"),
        (
            ChatCompletionBody,
            {
                **CHAT,
                "parallel_tool_calls": False,
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            "parallel_tool_calls",
        ),
    ],
    ids=str,
)
def test_parameters_that_do_not_go_together_are_refused(
    kind: type[GenerationBody], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    (error,) = caught.value.errors()
    assert error["type"] == "wrong_combination"
    assert param in f"{error['ctx']}"


@BOTH
def test_the_openapi_schema_says_what_is_taken(
    kind: type[GenerationBody], minimal: dict[str, Any]
) -> None:
    """Clients are generated from it, so it must tell every form and every refusal."""
    properties = kind.model_json_schema()["properties"]
    assert {"type": "string", "minLength": 1} in properties["stop"]["anyOf"]
    assert properties["temperature"]["anyOf"] == [
        {"type": "number", "minimum": 0, "maximum": 2},
        {"type": "null"},
    ]
    refused = properties["best_of" if kind is CompletionBody else "store"]
    assert refused["enum"] == [None, 1 if kind is CompletionBody else False]
