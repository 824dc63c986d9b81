"""Who has no key gets nothing, and no key is ever seen in a log, message or repr."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.logs import JsonFormatter
from runtime.server.options import Limits, ServerOptions
from runtime.server.security import Guard, check_exposure, is_loopback, load_api_keys
from tests.runtime.server.clients import NAME, complete, error_of
from tests.runtime.server.fakes import ScriptedModel, wait_until

KEY, OTHER = "sk-first-very-secret", "sk-second-very-secret"


@pytest.fixture
def guarded(tokenizer: Any) -> Iterator[Any]:
    with ExitStack() as stack:

        def serve(**options: Any) -> TestClient:
            engine = GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer)
            made = ServerOptions(api_keys=(KEY, OTHER), **options)
            client = TestClient(create_app(engine, model_name=NAME, options=made))
            stack.enter_context(client)
            wait_until(lambda: engine.state == "ready")
            return client

        yield serve


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_who_shows_a_key_is_answered(guarded: Any, key: str, scheme: str) -> None:
    client = guarded()
    client.headers["Authorization"] = f"{scheme} {key}"
    assert complete(client).status_code == 200
    assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("shown", "code"),
    [
        (None, "missing_api_key"),
        ("", "invalid_api_key"),
        (f"Bearer {KEY}x", "invalid_api_key"),
        (f"Bearer {KEY[:-1]}", "invalid_api_key"),
        ("Bearer ", "invalid_api_key"),
        (f"Basic {KEY}", "invalid_api_key"),
        (KEY, "invalid_api_key"),
        ("Bearer \xe4\xff", "invalid_api_key"),
    ],
)
def test_who_shows_none_gets_a_401_everywhere(guarded: Any, shown: str | None, code: str) -> None:
    client = guarded()
    headers = {} if shown is None else {"Authorization": shown.encode("latin-1")}
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nowhere"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/v1/%2e%2e/health"),
    ):
        reply = client.request(method, path, content=b"{", headers=headers)
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
        error = error_of(reply)
        assert (error["type"], error["code"]) == ("authentication_error", code)
        assert "x-request-id" in reply.headers
    assert client.get("/health").status_code == 200


def test_metrics_are_open_if_the_operator_says_so(guarded: Any) -> None:
    client = guarded(open_metrics=True)
    assert client.get("/metrics").status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_a_key_is_compared_with_all_keys_and_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def compare_digest(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    guard = Guard((KEY, OTHER), open_paths=())
    monkeypatch.setattr("secrets.compare_digest", compare_digest)
    for shown, passes in ((KEY, True), (OTHER, True), ("x", False)):
        compared.clear()
        refusal = guard.refusal("/v1/models", Headers({"authorization": f"Bearer {shown}"}))
        assert (refusal is None) == passes
        assert compared == [KEY.encode(), OTHER.encode()]


def test_without_keys_everybody_is_answered() -> None:
    assert Guard((), open_paths=()).refusal("/v1/models", Headers({})) is None


def test_no_secret_is_ever_logged_or_shown(guarded: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the right key nor a wrong one, nor a prompt, nor what stands in a query."""
    caplog.set_level(logging.DEBUG)
    client = guarded()
    secret = "prompt-very-secret"
    good = {"Authorization": f"Bearer {KEY}"}
    replies = [
        client.get("/v1/models?key=query-very-secret", headers=good),
        client.get("/v1/models", headers={"Authorization": "Bearer wrong-very-secret"}),
        client.post(
            "/v1/completions",
            json={"model": NAME, "prompt": secret, "max_tokens": 1, "stream": True},
            headers=good,
        ),
        client.post("/v1/completions", json={"model": NAME, "prompt": secret}, headers=good),
        client.post("/v1/completions", content=secret, headers=good),
        client.post("/nowhere", headers=good),
    ]
    assert [reply.status_code for reply in replies] == [200, 401, 200, 200, 400, 404]
    assert "Request " in caplog.text
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    formatted = "".join(JsonFormatter().format(record) for record in ours)
    bodies = "".join(reply.text for reply in replies)
    for text in (formatted, bodies, repr(ServerOptions(api_keys=(KEY,)))):
        assert "very-secret" not in text


def test_there_is_no_cors(guarded: Any) -> None:
    client = guarded()
    headers = {"Origin": "https://elsewhere.example", "Authorization": f"Bearer {KEY}"}
    replies = [
        client.get("/v1/models", headers=headers),
        client.options(
            "/v1/completions", headers={**headers, "Access-Control-Request-Method": "POST"}
        ),
    ]
    assert [reply.status_code for reply in replies] == [200, 405]
    for reply in replies:
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_openapi_page_says_that_a_key_is_needed(guarded: Any) -> None:
    client = guarded(open_metrics=True)
    page = client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert page["components"]["securitySchemes"] == {
        "api_key": {"type": "http", "scheme": "bearer"}
    }
    assert page["paths"]["/v1/completions"]["post"]["security"] == [{"api_key": []}]
    assert "401" in page["paths"]["/v1/completions"]["post"]["responses"]
    for path in ("/health", "/metrics"):
        assert "security" not in page["paths"][path]["get"]


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# mine\n\n  {KEY}\n{OTHER}\n")
    assert load_api_keys(file, {}) == (KEY, OTHER)
    assert load_api_keys(file, {"MOECAST_API_KEY": "third"}) == (KEY, OTHER, "third")
    assert load_api_keys(None, {"MOECAST_API_KEY": " "}) == ()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"# none\n", "holds no key"),
        (b"\xff\xfe", "cannot be read"),
        (b"ok\nwith space\n", "API key number 2"),
        ("schlüssel".encode(), "API key number 1"),
    ],
)
def test_a_key_file_that_is_none_is_refused_without_showing_it(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    file = tmp_path / "keys.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_api_keys(file, {})
    assert "space" not in str(caught.value).replace("without spaces", "")
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.5", False),
        ("myhost", False),
        ("", False),
    ],
)
def test_beyond_loopback_a_key_is_needed(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
    check_exposure(host, (KEY,))
    if expected:
        check_exposure(host, ())
    else:
        with pytest.raises(ValueError, match="MOECAST_API_KEY, or serve.api_key_file"):
            check_exposure(host, ())


@pytest.mark.parametrize("name", ["max_body_bytes", "max_requests", "max_request_s"])
def test_a_limit_that_allows_nothing_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        Limits(**{name: 0})


def test_a_json_line_has_the_extra_fields(guarded: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    guarded().get("/v1/models", headers={"X-Request-Id": "mine-7"})
    (record,) = [r for r in caplog.records if getattr(r, "request_id", None) == "mine-7"]
    line = json.loads(JsonFormatter().format(record))
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/models", 401)
    assert (line["level"], line["logger"]) == ("INFO", "runtime.server.middleware")
    assert line["seconds"] >= 0
    assert line["time"].endswith("+00:00")
