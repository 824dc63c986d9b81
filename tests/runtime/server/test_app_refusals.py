"""What the routes refuse, and how they say so."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.runtime.server.clients import NAME, Serve, chat, complete, error_of
from tests.runtime.server.fakes import (
    ScriptedModel,
)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"prompt": {}}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [4096]}, "prompt", "invalid_value"),
        ({"prompt": "x " * 3000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 2048}, "prompt", "context_length_exceeded"),
        ({"n": 100}, "prompt", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "invalid_value"),
        ({"return_routed_experts": True, "stream": True}, "return_routed_experts", "invalid_value"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_by_name(
    tiny: TestClient, body: dict[str, Any], param: str, code: str
) -> None:
    reply = complete(tiny, **body)
    error = error_of(reply)
    assert reply.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"].startswith(param)


def test_a_prompt_that_is_too_long_is_told_both_numbers(tiny: TestClient, tokenizer: Any) -> None:
    num_tokens = len(tokenizer("x " * 3000).input_ids)
    message = error_of(complete(tiny, prompt="x " * 3000))["message"]
    assert str(num_tokens) in message
    assert "2048" in message


def test_a_bad_message_is_refused_by_its_place(tiny: TestClient) -> None:
    error = error_of(chat(tiny, content=[{"type": "image_url", "image_url": {"url": "x"}}]))
    assert error["param"] == "messages[0].content"
    assert "image_url" in error["message"]


def test_what_the_chat_template_refuses_is_a_bad_request(tiny: TestClient) -> None:
    messages = [{"role": "wizard", "content": "hi"}]
    reply = tiny.post("/v1/chat/completions", json={"model": NAME, "messages": messages})
    assert reply.status_code == 400
    assert "unknown role wizard" in error_of(reply)["message"]


class NoTemplate:
    """A tokenizer without a chat template."""

    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)


def test_a_model_without_a_chat_template_says_so(serve: Serve, tokenizer: Any) -> None:
    client = serve(ScriptedModel([20]), tokenizer=NoTemplate(tokenizer))
    reply = chat(client)
    assert reply.status_code == 400
    assert "no chat template: use /v1/completions" in error_of(reply)["message"]
    assert complete(client).status_code == 200


def test_an_unknown_model_is_not_found(tiny: TestClient) -> None:
    for reply in (
        complete(tiny, model="other"),
        chat(tiny, model="other"),
        tiny.get("/v1/models/other"),
    ):
        error = error_of(reply)
        assert reply.status_code == 404
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'other'" in error["message"]
        assert NAME in error["message"]


def test_a_missing_model_is_named(tiny: TestClient) -> None:
    reply = tiny.post("/v1/completions", json={"prompt": "x"})
    assert reply.status_code == 400
    error = error_of(reply)
    assert (error["param"], error["code"]) == ("model", "missing_required_parameter")


@pytest.mark.parametrize("body", [b"{bad", b"", b"[1]", b'"text"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_bad_request(tiny: TestClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    reply = tiny.post("/v1/completions", content=body, headers=headers)
    assert reply.status_code == 400
    error_of(reply)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('"prompt": "x", "temperature": NaN', "temperature"),
        ('"prompt": "x", "temperature": 1e999', "temperature"),
        ('"prompt": "x", "h\\ud800": 1', None),
        ('"prompt": "\\ud800"', "prompt"),
        ('"prompt": "x", "user": "\\udfff"', "user"),
    ],
)
def test_what_json_can_spell_and_no_answer_can_hold_is_refused_by_name(
    tiny: TestClient, body: str, param: str | None
) -> None:
    reply = tiny.post(
        "/v1/completions",
        content=f'{{"model": "{NAME}", {body}}}',
        headers={"Content-Type": "application/json"},
    )
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param


def test_a_refusal_does_not_repeat_megabytes(tiny: TestClient) -> None:
    for reply in (complete(tiny, model="m" * 10**6), complete(tiny, **{"p" * 10**6: 1})):
        assert 400 <= reply.status_code < 500
        assert len(reply.content) < 5_000
        error_of(reply)


def test_malformed_json_is_told_where(tiny: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    reply = tiny.post("/v1/completions", content=b'{"model": ', headers=headers)
    assert "not valid JSON" in error_of(reply)["message"]
    assert "at character 10" in error_of(reply)["message"]


def test_unknown_paths_and_methods_get_the_error_form(tiny: TestClient) -> None:
    missing, wrong = tiny.get("/v1/embeddings"), tiny.get("/v1/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "/v1/embeddings" in error_of(missing)["message"]
    assert wrong.headers["allow"] == "POST"
    error_of(wrong)
