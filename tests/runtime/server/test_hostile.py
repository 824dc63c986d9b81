"""Malformed and hostile requests are all refused, and the next good one is answered."""

import asyncio
import json
import logging
from collections import Counter
from typing import Any

import pytest

from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.options import Limits, ServerOptions
from tests.runtime.server.clients import NAME
from tests.runtime.server.fakes import ScriptedModel
from tests.runtime.server.hostile import JSON_TYPE, Hostile, Reply, dumped, hostile_request, send

GOOD_EVERY = 25


def good_request() -> Hostile:
    body = {"model": NAME, "prompt": "hi", "max_tokens": 3, "temperature": 0}
    return Hostile("good", headers=[JSON_TYPE], body=[dumped(body)])


def check(request: Hostile, reply: Reply) -> str:
    """What became of a request; AssertionError unless it was refused in form, or harmless."""
    if reply.status is None:
        assert request.hangs_up
        return "hung up"
    assert "x-request-id" in reply.headers
    assert not {name for name in reply.headers if name in ("set-cookie", "x-injected", "location")}
    if 200 <= reply.status < 300:
        if reply.headers["content-type"].startswith("application/json"):
            json.loads(reply.body)
        elif reply.headers["content-type"].startswith("text/event-stream"):
            assert b"data: " in reply.body
        return "harmless"
    assert 400 <= reply.status < 500, reply
    if request.method != "HEAD":
        error = json.loads(reply.body)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
    return str(reply.status)


async def attack(tokenizer: Any, numbers: range) -> Counter[str]:
    """Send the requests of these numbers; how many had which fate."""
    model = ScriptedModel([20, 30, 2], eos_id=2)
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    options = ServerOptions(limits=Limits(max_body_bytes=60_000))
    app = create_app(engine, model_name=NAME, options=options)
    fates: Counter[str] = Counter()
    async with app.router.lifespan_context(app):
        while engine.state == "loading":
            await asyncio.sleep(0.01)
        expected: Any = None
        for number in numbers:
            request = hostile_request(number)
            try:
                fates[check(request, await send(app, request))] += 1
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"hostile request {number}, {request.kind}") from error
            if number % GOOD_EVERY == 0 or number == numbers[-1]:
                reply = await send(app, good_request())
                assert reply.status == 200, f"the good request after {number}"
                choices = json.loads(reply.body)["choices"]
                expected = expected or choices
                assert choices == expected
        assert engine.state == "ready"
        assert engine.num_running == engine.num_waiting == 0
    return fates


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(1_000), id="1000"),
        pytest.param(range(1_000, 11_000), id="10000", marks=pytest.mark.slow),
    ],
)
def test_hostile_requests_are_refused_and_good_ones_answered(
    tokenizer: Any, numbers: range, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    fates = asyncio.run(attack(tokenizer, numbers))
    assert sum(fates.values()) == len(numbers)
    assert fates["harmless"] < len(numbers) / 10  # or the requests are none
    assert {"400", "404", "405", "413", "hung up"} <= fates.keys()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
