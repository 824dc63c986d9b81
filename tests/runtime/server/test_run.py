"""A real server on a real socket, asked by the stock ``openai`` client."""

import asyncio
import json
import os
import random
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
from runtime.server.options import Limits, ServerOptions
from runtime.server.run import bind, make_server, serve
from tests.runtime.server.clients import CALL, say
from tests.runtime.server.fakes import WAIT_S, ScriptedModel, wait_until

NAME = "tiny"
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 10}
Run = Callable[..., tuple[str, GenerationEngine]]


@pytest.fixture(scope="module")
def run(tokenizer: Any) -> Iterator[Run]:
    """Run servers on free ports until the module's end; gives address and engine."""
    with ExitStack() as stack:

        def run_server(model: Any, **kwargs: Any) -> tuple[str, GenerationEngine]:
            engine = GenerationEngine(model=model, **{"tokenizer": tokenizer, **kwargs})
            server = make_server(create_app(engine, model_name=NAME), drain_s=0)
            reserved = stack.enter_context(closing(bind(port=0)))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [reserved]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            if isinstance(model, ScriptedModel):
                stack.callback(model.let, 10_000)
            wait_until(lambda: server.started and engine.state == "ready")
            host, port = reserved.getsockname()
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


def test_the_responses_of_the_client_are_streamed_and_whole(client: openai.OpenAI) -> None:
    ask = {"model": NAME, "input": "Hello", "temperature": 0, "max_output_tokens": 8}
    whole = client.responses.create(**ask)
    assert whole.usage is not None
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 8)
    events = list(client.responses.create(**ask, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.usage == whole.usage
    with client.responses.stream(**ask) as stream:  # the client's own assembly of the events
        for _ in stream:
            pass
    with pytest.raises(openai.BadRequestError, match="store"):
        client.responses.create(**ask, store=True)


def test_the_client_reads_tool_calls_of_chats_and_responses(run: Run, with_tools: Any) -> None:
    address, _ = run(say(with_tools, f"Sure.\n{CALL}"), tokenizer=with_tools)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "weather", "parameters": parameters}
    ask: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"type": "function", "function": function}],
    }
    with connect(address) as client:
        message = client.chat.completions.create(**ask).choices[0].message
        assert message.tool_calls is not None
        (called,) = message.tool_calls
        assert json.loads(called.function.arguments) == {"city": "Köln"}
        result = {"role": "tool", "tool_call_id": called.id, "content": "rain"}
        ask["messages"] += [message.model_dump(), result]
        with client.chat.completions.stream(**ask) as stream:  # the client's own assembly
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.tool_calls is not None
        assert final.message.tool_calls[0].function.name == "weather"
        tools: Any = [{"type": "function", **function}]
        with client.responses.stream(model=NAME, input="Weather?", tools=tools) as events:
            output = events.get_final_response().output
        assert [item.type for item in output] == ["message", "function_call"]


def test_logprobs_are_what_the_client_expects(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hello"}], logprobs=True, top_logprobs=2, **GREEDY
    )
    told = chat.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert all(token.logprob == token.top_logprobs[0].logprob for token in told.content)
    completion = client.completions.create(prompt="The weather", logprobs=2, echo=True, **GREEDY)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert completion.usage is not None
    assert len(logprobs.tokens) == completion.usage.total_tokens


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


def test_many_streams_with_hang_ups_are_neither_lost_nor_mixed_up(run: Run, model: Any) -> None:
    """Each answer equals the one that was given alone, whoever hung up in between."""
    address, engine = run(model)
    rng = random.Random(0)
    prompts = [f"{word} {number}" for number in range(10) for word in ("The", "def", "Dear", "1 +")]
    with connect(address) as client:
        alone = {
            prompt: client.completions.create(prompt=prompt, **GREEDY).choices[0].text
            for prompt in prompts
        }
    patience = {prompt: rng.choice([0, 1, 4, 99, 99]) for prompt in prompts}  # chunks until it goes

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:

            async def ask(prompt: str) -> str:
                text = ""
                async with await client.completions.create(
                    prompt=prompt, stream=True, **GREEDY
                ) as stream:
                    for _ in range(patience[prompt]):
                        try:
                            text += (await anext(aiter(stream))).choices[0].text
                        except StopAsyncIteration:
                            break
                return text

            return await asyncio.gather(*map(ask, prompts))

    for prompt, text in zip(prompts, asyncio.run(ask_all()), strict=True):
        if patience[prompt] == 99:
            assert text == alone[prompt]
        else:
            assert alone[prompt].startswith(text)
    assert len(set(alone.values())) > len(prompts) / 2
    wait_until(lambda: engine.num_running == engine.num_waiting == 0)


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
        (running,) = engine._open
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
    """uvicorn raises the signal again at its end; it must not kill what comes after serving."""
    model = ScriptedModel([20], permits=2)
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    reserved = bind(port=0)
    address = f"http://127.0.0.1:{reserved.getsockname()[1]}"

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

    def handler(number: int, frame: Any) -> None:
        raised.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            num_chunks = pool.submit(ask_and_stop)
            serve(create_app(engine, model_name=NAME), reserved=reserved)
            assert num_chunks.result(WAIT_S) == 9
        assert signal.getsignal(signal.SIGTERM) is handler  # as it was
    finally:
        signal.signal(signal.SIGTERM, before)
    assert engine.state == "stopped"
    assert raised == []


def is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_in_use_is_said_with_what_to_change() -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"serve.port={port}: another program listens .*=0"):
            bind(port=port)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"port": -1}, "port=-1: must be in 0..65535"),
        ({"port": 70000}, "port=70000"),
        ({"host": "no.such.host.invalid"}, "no such host"),
        ({"host": "203.0.113.1"}, "no such address"),
    ],
    ids=str,
)
def test_an_address_that_cannot_be_had_is_named(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        bind(**{"port": 0, **wrong})


def test_nobody_connects_to_a_reserved_address_before_it_serves() -> None:
    """A client that came while the model loads would hang; refused, it can try again."""
    with closing(bind(port=0)) as reserved, closing(socket.socket()) as early:
        with pytest.raises(ConnectionRefusedError):
            early.connect(reserved.getsockname())


def test_a_negative_drain_is_named(tokenizer: Any) -> None:
    engine = GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="drain_s=-1"):
        make_server(create_app(engine, model_name=NAME), drain_s=-1)


def test_a_body_that_dribbles_in_is_cut_off_and_others_are_answered(tokenizer: Any) -> None:
    engine = GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer)
    options = ServerOptions(limits=Limits(max_body_s=0.2))
    server = make_server(create_app(engine, model_name=NAME, options=options), drain_s=0)
    with closing(bind(port=0)) as reserved:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [reserved]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            with closing(socket.create_connection(reserved.getsockname(), WAIT_S)) as slow:
                slow.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
                )
                assert is_healthy(f"http://127.0.0.1:{reserved.getsockname()[1]}")
                assert slow.recv(100).startswith(b"HTTP/1.1 408")
        finally:
            server.should_exit = True
            thread.join()
