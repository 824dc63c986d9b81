"""Requests that are malformed or hostile, and a way to send them that lets nothing be repaired.

Everything is drawn from one `random.Random`, so that a number names a request. They are sent as
ASGI messages: an HTTP client would refuse half of them, and hide what the server itself refuses.
"""

import asyncio
import copy
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.runtime.server.clients import NAME

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"model": NAME, "prompt": "hi", "max_tokens": 2},
        {"model": NAME, "prompt": ["a", "b"], "n": 2, "stop": ["x"], "logprobs": 2, "echo": True},
        {"model": NAME, "prompt": [[10, 11]], "stream": True, "logit_bias": {"5": 1.5}},
    ],
    "/v1/chat/completions": [
        {"model": NAME, "messages": MESSAGES, "max_tokens": 2},
        {
            "model": NAME,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
        },
    ],
    "/v1/responses": [
        {"model": NAME, "input": "hi", "max_output_tokens": 2, "instructions": "Be brief."},
        {"model": NAME, "input": MESSAGES, "stream": True, "metadata": {"a": "b"}},
    ],
    "/tokenize": [{"prompt": "hi"}, {"messages": MESSAGES, "return_token_strs": True}],
    "/detokenize": [{"tokens": [10, 11, 12]}],
}
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3.5,
    2**31,
    2**63,
    -(2**63),
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "1",
    "null",
    "\x00",
    "\ud800",
    "a\udfffb",
    "\u202e\ufeff",
    "../../etc/passwd",
    "{{ 7 * 7 }}{% for x in y %}",
    "'; DROP TABLE models; --",
    "x" * 20_000,
    [],
    [None],
    [[]],
    [[[[1]]]],
    ["a", 1],
    [1, "a"],
    [2**70],
    [-1],
    list(range(300)),
    {},
    {"": ""},
    {"type": "text"},
    {"a": {"b": {"c": []}}},
    {"__class__": "x", "__proto__": {}},
]
KEYS = ["", "x", "model ", "MODEL", "__proto__", "\x00", "\ud800", "$ref", "best_off", "n\n", "🎉"]
TYPES = [
    b"text/plain",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data; boundary=x",
    b"application/json; charset=utf-16",
    b"application/xml",
    b"",
    b"\xff\xfe",
    b"application/jsonx",
]
PATHS = [
    "/",
    "//",
    "/..",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/v1/models/../../etc/passwd",
    "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/v1/models/" + "a" * 5000,
    "/v1/models/%00",
    "/v1/models/%ff%fe",
    "/v1/models/",
    "/v1/completions/",
    "/V1/COMPLETIONS",
    "/v1//completions",
    "/v1/completions%20",
    "/v1/completions;x=y",
    "/%76%31/completions%00",
    "/v1/engines/x/completions",
    "/health%0d%0aX-Injected: 1",
    "/openapi.json/..",
    "/docs/oauth2-redirect/x",
    "/.git/config",
    "/v1/files",
    "*",
]
METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "FOO", "post"]


@dataclass
class Hostile:
    """One request, as it stands on the wire; ``hangs_up`` before its body is complete."""

    kind: str
    method: str = "POST"
    path: str = "/v1/completions"
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: list[bytes] = field(default_factory=lambda: [b""])
    hangs_up: bool = False


@dataclass
class Reply:
    status: int | None
    headers: dict[str, str]
    body: bytes


JSON_TYPE = (b"content-type", b"application/json")


def hostile_request(number: int) -> Hostile:
    """The request of this number."""
    rng = random.Random(number)
    kind = rng.choice(
        [changed, changed, nested, torn, mistyped, with_headers, elsewhere, oversized]
    )
    request: Hostile = kind(rng)
    return request


def some_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(list(GOOD))
    return path, copy.deepcopy(rng.choice(GOOD[path]))


def changed(rng: random.Random) -> Hostile:
    """Valid but for one to three values, keys or omissions, at any depth."""
    path, body = some_body(rng)
    for _ in range(rng.randint(1, 3)):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
                place = place[key]
                continue
            action = rng.random()
            if action < 0.6:
                place[key] = copy.deepcopy(rng.choice(VALUES))
            elif action < 0.8:
                del place[key]
            elif isinstance(place, dict):
                place[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
            else:
                place.append(copy.deepcopy(rng.choice(VALUES)))
            break
    return Hostile("changed", path=path, headers=[JSON_TYPE], body=[dumped(body)])


def nested(rng: random.Random) -> Hostile:
    """Deeper, longer or larger than any parser likes."""
    path, body = some_body(rng)
    depth = rng.choice([10, 200, 2_000, 50_000])
    text = dumped(body).decode()
    hole = f'"{rng.choice(list(body))}":'
    filling = rng.choice(
        [
            "[" * depth + "]" * depth,
            "[" * depth,
            '{"a":' * depth + "1" + "}" * depth,
            "9" * depth,
            "-" + "9" * depth + "." + "9" * 50,
            "1e" + "9" * min(depth, 400),
            '"' + "\\u0000" * depth + '"',
            '"' + "\\ud83d" * min(depth, 200) + '"',
            "[" + ",".join(["0"] * depth) + "]",
        ]
    )
    text = text.replace(
        hole, f"{hole} {filling}, {hole}", 1
    )  # a duplicate key: the last one counts
    if rng.random() < 0.7:
        text = f'{{{hole} {filling}, "model": "{NAME}"}}'
    return Hostile("nested", path=path, headers=[JSON_TYPE], body=[text.encode()])


def torn(rng: random.Random) -> Hostile:
    """Not the bytes that were meant: cut, flipped, in another encoding, in pieces, unfinished."""
    path, body = some_body(rng)
    data = bytearray(dumped(body))
    damage = rng.randrange(7)
    if damage == 0:
        data = data[: rng.randrange(len(data))]
    elif damage == 1:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif damage == 2:
        at = rng.randrange(len(data))
        data[at:at] = rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x00", b"\xf8\x88"])
    elif damage == 3:
        data = bytearray(bytes(data).decode().encode(rng.choice(["utf-16", "utf-32", "utf-7"])))
    elif damage == 4:
        data = bytearray(rng.randbytes(rng.randint(0, 200)))
    elif damage == 5:
        data += rng.choice([b"}", b"{}", b"\n\n{", b",", b"//"])
    hangs_up = damage == 6
    cut = rng.randrange(len(data) + 1)
    pieces = [bytes(data[:cut]), bytes(data[cut:])]
    return Hostile("torn", path=path, headers=[JSON_TYPE], body=pieces, hangs_up=hangs_up)


def mistyped(rng: random.Random) -> Hostile:
    """A good body under a name that it has not."""
    path, body = some_body(rng)
    headers = [(b"content-type", rng.choice(TYPES))] if rng.random() < 0.9 else []
    if rng.random() < 0.3:
        headers.append((b"content-encoding", rng.choice([b"gzip", b"br", b"x"])))
    return Hostile("mistyped", path=path, headers=headers, body=[dumped(body)])


def with_headers(rng: random.Random) -> Hostile:
    """Headers of any size and content, mostly with a body that is wrong as well."""
    request = changed(rng)
    request.kind = "headers"
    request.headers += rng.choice(
        [
            [(b"x-request-id", rng.randbytes(50))],
            [(b"x-request-id", b"a" * 100_000)],
            [(b"x-request-id", b"a\r\nset-cookie: x=y")],
            [(b"authorization", b"Bearer " + rng.randbytes(30))],
            [(b"content-length", rng.choice([b"-1", b"x", b"9" * 500, b"1e9", b"", b"\xb2"]))],
            [(b"host", b"evil.example"), (b"x-forwarded-host", b"evil.example")],
            [(b"x-%d" % i, b"y") for i in range(500)],
            [JSON_TYPE, (b"content-type", b"text/plain")],
            [(b"expect", b"200-ok"), (b"transfer-encoding", b"identity")],
            [(b"cookie", b"a=" + b"b" * 50_000)],
        ]
    )
    return request


def elsewhere(rng: random.Random) -> Hostile:
    """Where nothing is, or by a method that is not allowed there."""
    body = [dumped({"model": NAME, "prompt": "hi"})]
    if rng.random() < 0.5:
        path = rng.choice(PATHS)
        if rng.random() < 0.3:
            path += "".join(rng.choice("/%.\\?#&=~абв0") for _ in range(rng.randint(1, 20)))
        return Hostile(
            "elsewhere", rng.choice(["GET", "POST"]), path, headers=[JSON_TYPE], body=body
        )
    return Hostile(
        "elsewhere",
        rng.choice(METHODS),
        rng.choice(list(GOOD)),
        query=rng.choice([b"", b"a=b", b"%ff=%00", b"x" * 5000]),
        headers=[JSON_TYPE],
        body=body,
    )


def oversized(rng: random.Random) -> Hostile:
    """More than the server takes: bytes, tokens, choices, prompts, stops."""
    path = "/v1/completions"
    body = {"model": NAME, "prompt": "hi"}
    body |= rng.choice(
        [
            {"prompt": "x " * 3_000},
            {"prompt": [10] * 5_000},
            {"prompt": ["a"] * 2_000},
            {"n": 128},
            {"max_tokens": 10**9},
            {"stop": ["s"] * 10_000},
            {"stop": "s" * 10_000, "prompt": []},
            {"logit_bias": {str(i): 1 for i in range(5_000)}},
            {"logprobs": 10**6},
            {"user": "u" * 10_000, "prompt": [[]]},
        ]
    )
    data = dumped(body)
    pieces = [data] if rng.random() < 0.8 else [b" " * 70_000, data]
    return Hostile("oversized", path=path, headers=[JSON_TYPE], body=pieces)


def dumped(body: Any) -> bytes:
    """As JSON: ASCII, with escapes for what is no character, and NaN."""
    return json.dumps(body).encode()


async def send(app: Any, request: Hostile) -> Reply:
    """Give ``request`` to the application, and wait for its answer."""
    raw_path = request.path.encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(request.path),
        "raw_path": raw_path,
        "root_path": "",
        "query_string": request.query,
        "headers": request.headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    messages = list(_messages(request.body, hangs_up=request.hangs_up))
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()  # stays connected
        raise AssertionError

    async def hear(message: Any) -> None:
        said.append(message)

    await asyncio.wait_for(app(scope, receive, hear), timeout=20)
    starts = [message for message in said if message["type"] == "http.response.start"]
    assert len(starts) <= 1
    if not starts:
        return Reply(None, {}, b"")
    headers = {
        key.decode("latin-1"): value.decode("latin-1") for key, value in starts[0]["headers"]
    }
    body = b"".join(m.get("body", b"") for m in said if m["type"] == "http.response.body")
    return Reply(starts[0]["status"], headers, body)


def _messages(body: Iterable[bytes], *, hangs_up: bool) -> Iterable[dict[str, Any]]:
    *pieces, last = body
    for piece in pieces:
        yield {"type": "http.request", "body": piece, "more_body": True}
    if hangs_up:
        yield {"type": "http.disconnect"}
    else:
        yield {"type": "http.request", "body": last, "more_body": False}
