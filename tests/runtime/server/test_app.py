"""The routes, through Starlette's test client."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from tests.runtime.server.fakes import (
    FakeOffload,
    Listener,
    ScriptedModel,
    request,
    samples,
    wait_until,
)

NAME = "org/tiny"
Serve = Callable[..., TestClient]


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Serve]:
    """Serve models until the end of the test; the engine is the client's ``engine``."""
    with ExitStack() as stack:

        def serve_model(model: Any, *, ready: bool = True, **kwargs: Any) -> TestClient:
            engine = GenerationEngine(model=model, **{"tokenizer": tokenizer, **kwargs})
            client = TestClient(create_app(engine, model_name=NAME), raise_server_exceptions=False)
            client.engine = engine  # type: ignore[attr-defined]
            stack.enter_context(client)
            if isinstance(model, ScriptedModel):
                stack.callback(model.let, 10_000)
            if ready:
                wait_until(lambda: engine.state == "ready")
            return client

        yield serve_model


@pytest.fixture(scope="module")
def tiny(model: Any, tokenizer: Any) -> Iterator[TestClient]:
    """The embedded model, served."""
    app = create_app(GenerationEngine(model=model, tokenizer=tokenizer), model_name=NAME)
    with TestClient(app) as client:
        yield client


def say(tokenizer: Any, text: str, **kwargs: Any) -> ScriptedModel:
    """A model that answers ``text`` and then ends."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ScriptedModel([*ids, 2], eos_id=2, **kwargs)


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"model": NAME, "prompt": "hi", **body})


def chat(client: TestClient, content: Any = "hi", **body: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **body})


def events(reply: Any) -> list[Any]:
    """The JSON of each server-sent event; checks the framing and the end."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    *lines, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error_of(reply: Any) -> dict[str, Any]:
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error


def test_a_completion_has_all_that_clients_read(serve: Serve, tokenizer: Any) -> None:
    reply = complete(serve(say(tokenizer, " there")), max_tokens=50).json()
    assert reply.pop("id").startswith("cmpl-")
    assert isinstance(reply.pop("created"), int)
    usage = reply.pop("usage")
    assert reply == {
        "object": "text_completion",
        "model": NAME,
        "choices": [{"index": 0, "text": " there", "logprobs": None, "finish_reason": "stop"}],
    }
    num_prompt = len(tokenizer("hi").input_ids)
    assert usage["prompt_tokens"] == num_prompt
    assert usage["total_tokens"] == num_prompt + usage["completion_tokens"]


def test_a_chat_completion_has_all_that_clients_read(serve: Serve, tokenizer: Any) -> None:
    reply = chat(serve(say(tokenizer, "Hello!"))).json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello!", "refusal": None}
    assert choice["finish_reason"] == "stop"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert reply["usage"]["prompt_tokens"] == len(rendered)


UNICODE = "Grüße 世界 🎉👩‍👩‍👧!"


def test_a_stream_has_one_chunk_per_token_and_joins_to_the_whole(
    serve: Serve, tokenizer: Any
) -> None:
    client = serve(say(tokenizer, UNICODE))
    whole = complete(client, max_tokens=100).json()
    chunks = events(complete(client, max_tokens=100, stream=True))
    assert len(chunks) == whole["usage"]["completion_tokens"]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == whole["choices"][0]["text"] == UNICODE
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_a_chat_stream_names_the_role_once(serve: Serve, tokenizer: Any) -> None:
    chunks = events(chat(serve(say(tokenizer, UNICODE)), stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta["content"] for delta in deltas) == UNICODE
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_usage_comes_last_and_without_choices(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "Hello!"))
    for ask in (complete, chat):
        whole = ask(client, max_tokens=100).json()
        *chunks, last = events(
            ask(client, max_tokens=100, stream=True, stream_options={"include_usage": True})
        )
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
        assert len(chunks) == last["usage"]["completion_tokens"]


def test_usage_so_far_comes_with_each_chunk_if_wanted(serve: Serve, tokenizer: Any) -> None:
    client = serve(say(tokenizer, "Hello!"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(complete(client, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == list(range(1, len(chunks) + 1))
    assert last["usage"] == chunks[-1]["usage"]


def test_stream_and_whole_agree_on_the_embedded_model(tiny: TestClient) -> None:
    asks = [{"temperature": 0}, {"seed": 3, "temperature": 0.9}, {"temperature": 0, "stop": "e"}]
    for options in asks:
        whole = complete(tiny, prompt="The weather", max_tokens=8, **options).json()
        chunks = events(complete(tiny, prompt="The weather", max_tokens=8, stream=True, **options))
        texts = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert texts == whole["choices"][0]["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_every_form_of_a_prompt_gives_the_same_answer(tiny: TestClient, tokenizer: Any) -> None:
    ids = tokenizer("The weather").input_ids
    options = {"max_tokens": 5, "temperature": 0}
    prompts = ["The weather", ["The weather"], ids, [ids]]
    answers = [complete(tiny, prompt=prompt, **options).json() for prompt in prompts]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(ids)}


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(
    tiny: TestClient, tokenizer: Any
) -> None:
    def ask(**body: Any) -> Any:
        return complete(tiny, max_tokens=4, seed=5, temperature=1.5, **body).json()

    both = ask(prompt=["One", "Two"], n=2)
    alone = [ask(prompt="One", n=2), ask(prompt="Two", n=2)]
    texts = [choice["text"] for choice in both["choices"]]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert texts == [choice["text"] for answer in alone for choice in answer["choices"]]
    assert texts[0] != texts[1]  # one seed, but not one answer
    num_read = sum(len(tokenizer(prompt).input_ids) for prompt in ("One", "Two"))
    assert both["usage"]["prompt_tokens"] == num_read  # not once per choice
    assert both["usage"]["completion_tokens"] == 16


def test_choices_are_streamed_under_their_index(serve: Serve, tokenizer: Any) -> None:
    chunks = events(chat(serve(say(tokenizer, "yes")), n=2, stream=True))
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == "yes"


def test_max_completion_tokens_wins_over_max_tokens(serve: Serve, tokenizer: Any) -> None:
    client = serve(ScriptedModel([20]))
    reply = chat(client, max_tokens=9, max_completion_tokens=3).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"
    assert chat(client, max_tokens=9).json()["usage"]["completion_tokens"] == 9
    assert complete(client).json()["usage"]["completion_tokens"] == 16  # OpenAI's default


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"logprobs": 3}, "logprobs", "unsupported_parameter"),
        ({"frequency_penalty": 1}, "frequency_penalty", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"prompt": {}}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [4096]}, "prompt", "invalid_value"),
        ({"prompt": "x " * 3000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 2048}, "prompt", "context_length_exceeded"),
        ({"n": 100}, "prompt", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
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


def test_malformed_json_is_told_where(tiny: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    reply = tiny.post("/v1/completions", content=b'{"model": ', headers=headers)
    assert "not valid JSON" in error_of(reply)["message"]
    assert "at character 10" in error_of(reply)["message"]


def test_unknown_paths_and_methods_get_the_error_form(tiny: TestClient) -> None:
    missing, wrong = tiny.get("/v1/responses"), tiny.get("/v1/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "/v1/responses" in error_of(missing)["message"]
    assert wrong.headers["allow"] == "POST"
    error_of(wrong)


def test_models_are_listed_with_their_context(tiny: TestClient) -> None:
    listed = tiny.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (NAME, "model", 2048)
    assert tiny.get(f"/v1/models/{NAME}").json() == card


def test_the_version_is_a_string(tiny: TestClient) -> None:
    assert isinstance(tiny.get("/version").json()["version"], str)


def test_the_request_id_is_echoed_or_made_up(tiny: TestClient) -> None:
    echoed = tiny.get("/health", headers={"X-Request-Id": "mine-1"})
    assert echoed.headers["x-request-id"] == "mine-1"
    made_up = {tiny.get("/nowhere").headers["x-request-id"] for _ in range(2)}
    assert len(made_up) == 2


def test_health_is_503_until_the_model_runs(serve: Serve) -> None:
    model = ScriptedModel([20], permits=0)
    client = serve(model, ready=False)
    loading = client.get("/health")
    assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
    model.let(1)
    wait_until(lambda: client.get("/health").status_code == 200)
    assert client.get("/health").json() == {"status": "ready"}


def test_a_model_that_does_not_run_is_told_by_health_and_by_requests(serve: Serve) -> None:
    client = serve(ScriptedModel([20], broken={0: RuntimeError("bad weights")}), ready=False)
    wait_until(lambda: client.get("/health").json()["status"] == "failed")
    health = client.get("/health")
    assert health.status_code == 503
    assert "bad weights" in health.json()["message"]
    reply = complete(client)
    assert reply.status_code == 503
    assert "bad weights" in error_of(reply)["message"]


def test_a_failure_while_generating_is_a_500_with_its_reason(serve: Serve) -> None:
    client = serve(ScriptedModel([20], broken={2: RuntimeError("no memory")}))
    reply = complete(client)
    assert reply.status_code == 500
    assert error_of(reply)["type"] == "server_error"
    assert "no memory" in error_of(reply)["message"]
    assert complete(client).status_code == 200


def test_a_failure_within_a_stream_arrives_as_an_event(serve: Serve) -> None:
    client = serve(ScriptedModel([20], broken={3: RuntimeError("no memory")}))
    *chunks, last = events(complete(client, stream=True))
    assert len(chunks) == 2
    assert last["error"]["type"] == "server_error"
    assert "no memory" in last["error"]["message"]


def test_a_full_queue_is_429_with_retry_after(serve: Serve) -> None:
    model = ScriptedModel([20], permits=1)
    client = serve(model, max_queue=1)
    engine: GenerationEngine = client.engine  # type: ignore[attr-defined]
    engine.submit([request(max_tokens=1)] * 2, Listener())
    reply = complete(client)
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    error = error_of(reply)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert "2 of 2" in error["message"]
    model.let(10)
    wait_until(lambda: engine.num_running == 0 and engine.num_waiting == 0)
    assert complete(client, max_tokens=1).status_code == 200


def test_metrics_count_what_happened_under_vllms_names(serve: Serve, tokenizer: Any) -> None:
    model = say(tokenizer, "yes")
    client, num_said = serve(model), len(model.script)
    assert samples(client)["vllm:generation_tokens_total"] == 0
    num_read = complete(client).json()["usage"]["prompt_tokens"]
    complete(client, max_tokens=1)
    found = samples(client)
    assert found["vllm:prompt_tokens_total"] == 2 * num_read
    assert found["vllm:generation_tokens_total"] == num_said + 1
    assert found["vllm:request_success_total{finished_reason=stop}"] == 1
    assert found["vllm:request_success_total{finished_reason=length}"] == 1
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:inter_token_latency_seconds_count"] == num_said - 1
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert found[f"vllm:{name}_count"] == 2
    assert found["vllm:request_generation_tokens_sum"] == num_said + 1
    assert found["vllm:iteration_tokens_total_sum"] == 2 * num_read + num_said + 1
    assert not any(name.startswith("moecast_") for name in found)


def test_expert_metrics_are_the_offloads_own_counters(serve: Serve) -> None:
    offload = FakeOffload()
    client = serve(ScriptedModel([20]), offload=offload)
    offload.counted.hits = 70
    offload.counted.misses, offload.counted.streamed = 30, 4
    offload.counted.evictions = 9
    offload.counted.miss_bytes, offload.counted.stall_s = 5000, 1.5
    found = samples(client)
    assert {name: value for name, value in found.items() if name.startswith("moecast_")} == {
        "moecast_expert_cache_hits_total": 70,
        "moecast_expert_cache_misses_total{reason=loaded}": 26,
        "moecast_expert_cache_misses_total{reason=streamed}": 4,
        "moecast_expert_cache_evictions_total": 9,
        "moecast_expert_miss_bytes_total": 5000,
        "moecast_expert_stall_seconds_total": 1.5,
        "moecast_expert_cache_capacity_bytes": 3 * 100 + 2 * 200,
    }
    offload.counted.hits = 71
    assert samples(client)["moecast_expert_cache_hits_total"] == 71


def test_gauges_show_who_runs_and_who_waits(serve: Serve) -> None:
    model = ScriptedModel([20], permits=1)
    client = serve(model)
    engine: GenerationEngine = client.engine  # type: ignore[attr-defined]
    engine.submit([request(max_tokens=1)] * 3, Listener())
    wait_until(lambda: engine.num_running == 1)
    found = samples(client)
    assert found["vllm:num_requests_running"] == 1
    assert found["vllm:num_requests_waiting"] == 2


def test_two_servers_of_one_process_count_apart(serve: Serve) -> None:
    first, second = serve(ScriptedModel([20])), serve(ScriptedModel([20]))
    complete(first, max_tokens=3)
    assert samples(first)["vllm:generation_tokens_total"] == 3
    assert samples(second)["vllm:generation_tokens_total"] == 0
