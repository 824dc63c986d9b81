"""The soak test finds what it is there to find, and a short one of the real server passes."""

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from benchmarks.serve_soak import Answers, _answer, summary
from benchmarks.soak_load import ANSWER_TOKENS, Arrival, Ask, plan, recorded_arrivals, replay
from data.models import load_model
from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.run import bind, make_server
from tests.runtime.server.fakes import ScriptedModel, wait_until

RECORDED = [(0.1 * i, 40 + 90 * (i % 9), 30 + 40 * (i % 8)) for i in range(400)]
Serve = Callable[[FastAPI], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve applications on free ports until the end of the test."""
    running = []

    def start(app: FastAPI) -> str:
        server = make_server(app, drain_s=5)
        reserved = bind(port=0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [reserved]})
        running.append((server, thread, reserved))
        thread.start()
        wait_until(lambda: server.started)
        host, port = reserved.getsockname()[:2]
        return f"http://{host}:{port}"

    yield start
    for server, thread, reserved in running:
        server.should_exit = True
        thread.join()
        reserved.close()


def arrivals_of(seconds: float, rate: float, hang_ups: float = 0.3) -> list[Arrival]:
    return plan(RECORDED, duration_s=seconds, rate=rate, hang_ups=hang_ups, vocab_size=4096, seed=1)


def test_requests_keep_the_recorded_rhythm_at_the_wanted_rate() -> None:
    arrivals = arrivals_of(60.0, 5.0)
    assert len(arrivals) == pytest.approx(300, abs=2)
    gaps = {
        round(after.at_s - before.at_s, 3)
        for before, after in zip(arrivals, arrivals[1:], strict=False)
    }
    assert gaps <= {0.2, 0.199, 0.201}
    assert 0.2 < sum(arrival.hang_up_after is not None for arrival in arrivals) / 300 < 0.4
    assert {arrival.ask.max_tokens for arrival in arrivals} <= set(ANSWER_TOKENS)
    assert len({arrival.ask for arrival in arrivals}) < 100  # few enough to know their answers


def test_the_same_seed_gives_the_same_load() -> None:
    assert arrivals_of(10.0, 5.0) == arrivals_of(10.0, 5.0)


def test_recorded_arrivals_are_read_from_where_one_wants(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("arrival_s,input_tokens,output_tokens\n0.0,374,44\n4.5,396,109\n")
    assert recorded_arrivals(path) == [(0.0, 374, 44), (4.5, 396, 109)]
    assert recorded_arrivals(path, skip_s=1.0) == [(4.5, 396, 109)]


def said_by(app_text: Callable[[int], list[str]]) -> FastAPI:
    """A server that says what it is told to, whatever is asked."""
    app = FastAPI()
    numbers = iter(range(10**6))

    @app.post("/v1/completions")
    async def completions() -> StreamingResponse:
        lines = app_text(next(numbers))

        async def events() -> Any:
            for line in lines:
                yield f"data: {line}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def chunk(text: str, reason: str = "null") -> str:
    return f'{{"choices": [{{"text": "{text}", "finish_reason": {reason}}}]}}'


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([chunk("a"), chunk("b", '"length"')], "answered"),
        ([chunk("a"), chunk("c", '"length"')], "wrong"),
        ([chunk("ab", '"length"')], "wrong"),
        ([chunk("a")], "lost"),
        (['{"error": {"message": "no"}}'], "lost"),
        ([], "lost"),
    ],
)
def test_an_answer_that_is_mixed_up_or_missing_is_found(
    serve: Serve, lines: list[str], found: str
) -> None:
    address = serve(said_by(lambda _: lines))
    ask = Ask((20, 30), 2, None)
    outcome = asyncio.run(
        replay(
            address,
            [Arrival(at_s=0.0, ask=ask, hang_up_after=None)] * 3,
            model="m",
            clients=2,
            answer_of=lambda _: "ab",
            patience_s=20.0,
        )
    )
    values = summary(outcome, took_s=1.0)
    assert {name: values[name] for name in ("answered", "wrong", "lost")} == {
        "answered": 0,
        "wrong": 0,
        "lost": 0,
        found: 3,
    }


@pytest.mark.parametrize("mode", ["batched", "single"])
def test_a_server_under_many_clients_loses_and_mixes_up_nothing(serve: Serve, mode: Any) -> None:
    """The soak test, some seconds long, in this process."""
    arrivals = arrivals_of(2.0, 12.0, hang_ups=0.5)
    answers = Answers({arrival.ask for arrival in arrivals})
    model, tokenizer = load_model("tiny_moe", dtype="float32", revision=None)
    engine = GenerationEngine(model=model, tokenizer=tokenizer, mode=mode)
    address = serve(create_app(engine, model_name="tiny"))
    wait_until(lambda: engine.state == "ready")
    outcome = asyncio.run(
        replay(address, arrivals, model="tiny", clients=16, answer_of=answers, patience_s=60.0)
    )
    assert outcome.wrong == outcome.lost == []
    assert outcome.answered + outcome.hung_up == len(arrivals)
    assert min(outcome.answered, outcome.hung_up) > 2  # of 24
    wait_until(lambda: engine.num_running == engine.num_waiting == 0 and engine.kv_usage == 0.0)


def test_an_answer_that_fails_is_raised_to_who_waits_and_the_engine_goes_on() -> None:
    _, tokenizer = load_model("tiny_moe", dtype="float32", revision=None)
    model = ScriptedModel([20, 21], broken={1: ZeroDivisionError("no answer")})
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    engine.start()
    with pytest.raises(ZeroDivisionError, match="no answer"):
        _answer(engine, Ask((20, 30), 2, None))
    assert _answer(engine, Ask((20, 30), 2, None))
    assert engine.num_restarts == 0
    engine.shutdown()
