"""Every limit is enforced, says what it is, and hurts nobody else."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.middleware import RequestLog
from runtime.server.options import Limits, ServerOptions
from runtime.server.prompts import longest_token
from tests.runtime.server.clients import NAME, chat, complete, error_of, events
from tests.runtime.server.fakes import WAIT_S, ScriptedModel, wait_until


@pytest.fixture
def limited(tokenizer: Any) -> Iterator[Any]:
    with ExitStack() as stack:

        def serve(model: ScriptedModel, **limits: Any) -> TestClient:
            engine = GenerationEngine(model=model, tokenizer=tokenizer)
            options = ServerOptions(limits=Limits(**limits))
            client = TestClient(create_app(engine, model_name=NAME, options=options))
            stack.enter_context(client)
            stack.callback(model.let, 10_000)
            wait_until(lambda: engine.state == "ready")
            client.engine = engine  # type: ignore[attr-defined]
            return client

        yield serve


def test_a_body_that_is_too_large_is_refused(limited: Any) -> None:
    client = limited(ScriptedModel([20]), max_body_bytes=1000)
    announced = complete(client, prompt="x" * 1000)

    def in_pieces() -> Iterator[bytes]:  # without a length
        yield from [b"x" * 300] * 4

    chunked = client.post("/v1/completions", content=in_pieces())
    for reply in (announced, chunked):
        assert reply.status_code == 413
        error = error_of(reply)
        assert error["code"] == "body_too_large"
        assert "1000 bytes" in error["message"]
    assert complete(client, max_tokens=1).status_code == 200


def test_a_prompt_past_the_limit_is_told_both_numbers(limited: Any) -> None:
    client = limited(ScriptedModel([20]), max_prompt_tokens=5)
    reply = complete(client, prompt=[[10] * 5, [10] * 6])
    assert reply.status_code == 400
    error = error_of(reply)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "6 tokens" in error["message"]
    assert "at most 5" in error["message"]
    assert complete(client, prompt=[10] * 5).status_code == 200


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    limited: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding two million characters takes seconds of a core, and many clients may send them."""
    client = limited(ScriptedModel([20]))
    longest = max(map(len, tokenizer.get_vocab()))
    text = "x" * (256 * longest + 1)

    def encode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(type(tokenizer), "__call__", encode)
    as_input = client.post("/v1/responses", json={"model": NAME, "input": text})
    for reply, param in (
        (complete(client, prompt=text), "prompt"),
        (chat(client, content=text), "messages"),
        (as_input, "input"),
    ):
        assert reply.status_code == 400
        error = error_of(reply)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "characters do not fit" in error["message"]


def test_tokens_are_counted_of_what_may_fit_and_of_no_more(limited: Any) -> None:
    client = limited(ScriptedModel([20]))
    text = "x " * (client.engine.max_context_tokens * longest_token(client.engine.tokenizer))
    messages = [{"role": "user", "content": text}]
    for body in ({"prompt": text}, {"messages": messages}):
        reply = client.post("/tokenize", json=body)
        assert reply.status_code == 400
        error = error_of(reply)
        assert (error["param"], error["code"]) == (next(iter(body)), "context_length_exceeded")
    # Too much for a completion can still be counted.
    some = {"prompt": "x " * client.engine.max_context_tokens}
    assert client.post("/tokenize", json=some).status_code == 200


def test_counting_tokens_takes_a_place_among_the_open_requests(limited: Any) -> None:
    model = ScriptedModel([20], permits=1)
    client = limited(model, max_requests=1)
    asks = (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [20]}))
    with ThreadPoolExecutor(1) as pool:
        is_open = pool.submit(complete, client, max_tokens=1)
        wait_until(lambda: client.engine.num_running == 1)
        replies = [client.post(path, json=body) for path, body in asks]
        model.let(1)
        assert is_open.result(WAIT_S).status_code == 200
    for reply in replies:
        assert (reply.status_code, error_of(reply)["code"]) == (429, "too_many_requests")
    for path, body in asks * 2:  # and gives it back
        assert client.post(path, json=body).status_code == 200


def test_an_answer_past_the_limit_is_refused_and_one_without_length_gets_it(limited: Any) -> None:
    client = limited(ScriptedModel([20]), max_new_tokens=4)
    reply = complete(client, max_tokens=5)
    assert (reply.status_code, error_of(reply)["param"]) == (400, "max_tokens")
    for ask in (complete, chat):
        assert ask(client).json()["usage"]["completion_tokens"] == 4


def test_one_request_more_than_the_limit_is_told_to_come_again(limited: Any) -> None:
    model = ScriptedModel([20], permits=1)
    client = limited(model, max_requests=2)
    with ThreadPoolExecutor(2) as pool:
        open_requests = [pool.submit(complete, client, max_tokens=1) for _ in range(2)]
        wait_until(lambda: client.engine.num_running + client.engine.num_waiting == 2)
        reply = complete(client)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert error_of(reply)["code"] == "too_many_requests"
        assert client.get("/v1/models").status_code == 200
        model.let(2)
        assert [r.result(WAIT_S).status_code for r in open_requests] == [200, 200]
    model.let(100)
    for _ in range(5):  # every way out gives the place back
        assert complete(client, max_tokens=1).status_code == 200
        assert complete(client, max_tokens=1, stream=True).status_code == 200
        assert complete(client, max_tokens=1000).status_code == 400
        assert complete(client, model="other").status_code == 404


def test_an_answer_that_takes_too_long_is_a_408_and_frees_the_engine(limited: Any) -> None:
    model = ScriptedModel([20], permits=1)
    client = limited(model, max_request_s=0.05)
    whole = complete(client)
    assert whole.status_code == 408
    assert error_of(whole)["code"] == "request_timeout"
    assert "0.05 s" in error_of(whole)["message"]
    (last,) = events(complete(client, stream=True))
    assert last["error"]["code"] == "request_timeout"
    model.let(1000)
    wait_until(lambda: client.engine.num_running == client.engine.num_waiting == 0)
    assert model.num_forwards <= 3


@pytest.mark.parametrize("given", ["", "a b", "ü".encode().decode("latin-1"), "x" * 129])
def test_an_id_that_is_none_is_replaced(tiny: TestClient, given: str) -> None:
    reply = tiny.get("/health", headers={"X-Request-Id": given.encode("latin-1")})
    assert len(reply.headers["x-request-id"]) == 32


def test_a_crash_is_a_500_in_the_error_form_with_the_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    app.add_middleware(RequestLog)

    @app.get("/crash")
    def crash() -> None:
        raise RuntimeError("broken here")

    reply = TestClient(app).get("/crash", headers={"X-Request-Id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
    assert error_of(reply)["type"] == "server_error"
    assert "broken here" in caplog.text
    assert "mine" in caplog.text


def test_a_path_cannot_write_a_line_of_its_own_into_the_log(
    tiny: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tiny.get("/x%0aRequest%20forged")
    assert all("\n" not in record.getMessage() for record in caplog.records)
