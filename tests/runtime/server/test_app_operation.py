"""The routes that operators watch: models, health, failures, a full queue, metrics."""

from typing import Any

from starlette.testclient import TestClient

from runtime.server.generation import GenerationEngine
from tests.runtime.server.clients import NAME, Serve, complete, error_of, events, say
from tests.runtime.server.fakes import (
    FakeOffload,
    Listener,
    ScriptedModel,
    request,
    samples,
    wait_until,
)


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
    assert not any(name.startswith("moecast_expert_") for name in found)


def test_expert_metrics_are_the_offloads_own_counters(serve: Serve) -> None:
    offload = FakeOffload()
    client = serve(ScriptedModel([20]), offload=offload)
    offload.counted.hits = 70
    offload.counted.misses, offload.counted.streamed = 30, 4
    offload.counted.evictions = 9
    offload.counted.miss_bytes, offload.counted.stall_s = 5000, 1.5
    found = samples(client)
    assert {name: value for name, value in found.items() if name.startswith("moecast_expert_")} == {
        "moecast_expert_cache_hits_total": 70,
        "moecast_expert_cache_misses_total{reason=loaded}": 26,
        "moecast_expert_cache_misses_total{reason=streamed}": 4,
        "moecast_expert_cache_evictions_total": 9,
        "moecast_expert_miss_bytes_total": 5000,
        "moecast_expert_stall_seconds_total": 1.5,
        "moecast_expert_cache_capacity_bytes": 3 * 100 + 2 * 200,
        "moecast_expert_counters_age_seconds": 0,
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
