"""A real server on a real socket, asked by the stock ``openai`` client."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx
import openai
import pytest

from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.run import make_server, serve
from tests.runtime.server.fakes import WAIT_S, ScriptedModel, wait_until

NAME = "tiny"
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 10}
Run = Callable[..., tuple[str, GenerationEngine]]


@pytest.fixture(scope="module")
def run(tokenizer: Any) -> Iterator[Run]:
    """Run servers on free ports until the module's end; gives address and engine."""
    with ExitStack() as stack:

        def run_server(model: Any, **kwargs: Any) -> tuple[str, GenerationEngine]:
            engine = GenerationEngine(model=model, tokenizer=tokenizer, **kwargs)
            server = make_server(create_app(engine, model_name=NAME), port=0, drain_s=0)
            thread = threading.Thread(target=server.run)
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            if isinstance(model, ScriptedModel):
                stack.callback(model.let, 10_000)
            wait_until(lambda: server.started and engine.state == "ready")
            host, port = server.servers[0].sockets[0].getsockname()
            return f"http://{host}:{port}", engine

        yield run_server


@pytest.fixture(scope="module")
def address(run: Run, model: Any) -> str:
    """Where the embedded model is served."""
    return run(model)[0]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with connect(address) as client:
        yield client


def connect(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_client_finds_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_greedy_completions_equal_those_of_generate(
    client: openai.OpenAI, model: Any, tokenizer: Any
) -> None:
    inputs = tokenizer("The weather in", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    new_ids = expected[0, inputs["input_ids"].shape[1] :]
    answer = client.completions.create(prompt="The weather in", **GREEDY)
    assert answer.choices[0].text == tokenizer.decode(new_ids, skip_special_tokens=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(new_ids)


def test_a_chat_goes_on_with_what_was_answered(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    first = client.chat.completions.create(messages=messages, **GREEDY).choices[0].message
    assert (first.role, bool(first.content)) == ("assistant", True)
    messages += [first.model_dump(), {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(messages=messages, **GREEDY)
    assert second.choices[0].finish_reason in ("stop", "length")


def test_streams_join_to_the_whole_and_end_with_the_usage(client: openai.OpenAI) -> None:
    ask = {**GREEDY, "messages": [{"role": "user", "content": "Hello"}]}
    whole = client.chat.completions.create(**ask)
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len(chunks) == last.usage.completion_tokens


def test_asynchronous_clients_are_all_answered(address: str) -> None:
    prompts = ["The weather in", "def add(a, b):", "Dear customer"]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:

            async def whole(prompt: str) -> str:
                answer = await client.completions.create(prompt=prompt, **GREEDY)
                return answer.choices[0].text

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            asks = [ask(prompt) for ask in (whole, streamed) for prompt in prompts]
            return await asyncio.gather(*asks)

    answers = asyncio.run(ask_all())
    assert answers[:3] == answers[3:]
    assert len(set(answers)) == 3


def test_errors_become_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="x " * 3000, **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="x", best_of=2, **GREEDY)
    assert caught.value.param == "best_of"


def test_a_full_queue_is_the_clients_rate_limit_error(run: Run) -> None:
    model = ScriptedModel([20], permits=1)
    address, engine = run(model, max_queue=0)
    with connect(address) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.completions.create, model=NAME, prompt="x", max_tokens=1)
        wait_until(lambda: engine.num_running == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=NAME, prompt="x", max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        model.let(1)
        assert running.result(WAIT_S).choices[0].finish_reason == "length"


def test_a_failure_within_a_stream_is_raised_by_the_client(run: Run) -> None:
    address, _ = run(ScriptedModel([20], broken={2: RuntimeError("no memory")}))
    with connect(address) as client:
        stream = client.completions.create(model=NAME, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="no memory"):
            list(stream)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_hangs_up_frees_the_engine(run: Run, stream: bool) -> None:
    model = ScriptedModel([20], permits=2)
    address, engine = run(model)
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 200, "stream": stream})
    host, port = address.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=WAIT_S)) as connection:
        connection.sendall(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_until(lambda: model.num_forwards == 2)  # the trial pass and the first token's
        running = engine._running
        assert running is not None
    wait_until(lambda: running.cancelled)
    model.let(1)  # the pass that was under way; no other may follow
    wait_until(lambda: engine.num_running == 0)
    assert running.num_tokens <= 2


def test_health_and_metrics_answer_while_the_engine_is_busy(run: Run) -> None:
    model = ScriptedModel([20], permits=1)
    address, engine = run(model)
    with connect(address) as client, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(client.completions.create, model=NAME, prompt="x", max_tokens=1)
        wait_until(lambda: engine.num_running == 1)
        assert httpx.get(f"{address}/health").status_code == 200
        metrics = httpx.get(f"{address}/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert f'vllm:num_requests_running{{model_name="{NAME}"}} 1.0' in metrics.text
        model.let(1)
        pending.result(WAIT_S)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_a_signal_ends_the_server_after_the_running_answer(
    tokenizer: Any, stop: signal.Signals
) -> None:
    """uvicorn raises the signal again at its end: SIGTERM would end the tests, so it is caught."""
    model = ScriptedModel([20], permits=2)
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def ask_and_stop() -> int:
        wait_until(lambda: is_healthy(address))
        with connect(address) as client:
            stream = client.completions.create(model=NAME, prompt="x", max_tokens=9, stream=True)
            next(stream)
            os.kill(os.getpid(), stop)
            wait_until(lambda: not is_healthy(address))
            model.let(8)
            return 1 + len(list(stream))

    raised: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: raised.append(number))
    try:
        with ThreadPoolExecutor(1) as pool:
            num_chunks = pool.submit(ask_and_stop)
            serve(create_app(engine, model_name=NAME), port=port)
            assert num_chunks.result(WAIT_S) == 9
    finally:
        signal.signal(signal.SIGTERM, before)
    assert engine.state == "stopped"
    assert raised == [stop] * (stop == signal.SIGTERM)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_in_use_ends_with_an_error(tokenizer: Any) -> None:
    engine = GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer)
    app = create_app(engine, model_name=NAME)
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit):
            serve(app, port=other.getsockname()[1])


@pytest.mark.parametrize("wrong", [{"port": -1}, {"port": 70000}, {"drain_s": -1}], ids=str)
def test_a_wrong_setting_is_named(tokenizer: Any, wrong: dict[str, int]) -> None:
    engine = GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_server(create_app(engine, model_name=NAME), **wrong)
