"""What a client asks in headers is what its request's objectives are, or it is refused by name."""

import math
from typing import Any

import pytest
from starlette.testclient import TestClient

from runtime.scheduler import StepCosts
from runtime.server.objectives import Objectives
from runtime.server.slo import SLO
from tests.runtime.server.clients import NAME, Serve, chat, complete, error_of
from tests.runtime.server.fakes import samples, wait_until

BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 3, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "ignore_eos": True,
    },
    "/v1/responses": {"input": "hi", "max_output_tokens": 3, "ignore_eos": True},
}


@pytest.fixture
def kept(serve: Serve, model: Any) -> TestClient:
    """A server that keeps objectives and has none of its own."""
    costs = StepCosts(fixed_s=8e-3, sequence_s=1e-3, prompt_token_s=2e-4)
    return serve(model, mode="batched", scheduler=SLO, objectives=Objectives(costs=costs))


@pytest.mark.parametrize("path", BODIES)
def test_each_route_reads_them(kept: TestClient, path: str) -> None:
    def verdicts() -> dict[str, float]:
        found = samples(kept)
        return {
            name: found[f"moecast_slo_requests_total{{task=,verdict={name}}}"]
            for name in ("kept", "first_token_late", "pace_slow", "failed")
        }

    def ask(**headers: str) -> None:
        body = {"model": NAME, **BODIES[path]}
        kept.post(path, json=body, headers=headers).raise_for_status()
        engine = kept.engine  # type: ignore[attr-defined]
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)

    ask()
    assert sum(verdicts().values()) == 0  # who wants nothing gets nothing that counts
    ask(**{"x-slo-ttft-ms": "600000"})
    assert verdicts()["kept"] == 1
    ask(**{"x-slo-ttft-ms": "0.001"})
    assert verdicts()["first_token_late"] == 1
    ask(**{"x-slo-ttft-ms": "600000", "x-slo-tpot-ms": "0.001"})
    assert verdicts() == {"kept": 1, "first_token_late": 1, "pace_slow": 1, "failed": 0}
    assert samples(kept)["moecast_slo_estimates_total"] == 4
    assert samples(kept)["moecast_slo_ruling"] == 1


@pytest.mark.parametrize("value", ["0", "-5", "soon", "", "nan", "inf", "1e99", "1,2"])
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
def test_a_bad_value_is_refused_by_name(kept: TestClient, name: str, value: str) -> None:
    body = {"model": NAME, **BODIES["/v1/completions"]}
    reply = kept.post("/v1/completions", json=body, headers={name: value})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == name
    assert error_of(reply)["code"] == "invalid_value"
    assert error_of(reply)["message"].startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
def test_a_server_that_keeps_none_ignores_none(serve: Serve, model: Any, name: str) -> None:
    client = serve(model)
    body = {"model": NAME, **BODIES["/v1/completions"]}
    reply = client.post("/v1/completions", json=body, headers={name: "100"})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == name
    assert error_of(reply)["code"] == "unsupported_parameter"
    assert not any(sample.startswith("moecast_slo") for sample in samples(client))


def test_the_page_has_them_where_they_are_kept(kept: TestClient, tiny: TestClient) -> None:
    def headers(client: TestClient, path: str) -> dict[str, Any]:
        page = client.get("/openapi.json").json()
        return {p["name"]: p for p in page["paths"][path]["post"].get("parameters", [])}

    for path in BODIES:
        assert set(headers(kept, path)) == {"x-slo-ttft-ms", "x-slo-tpot-ms"}
        assert not headers(tiny, path)
    number, *_ = headers(kept, "/v1/responses")["x-slo-ttft-ms"]["schema"]["anyOf"]
    assert number["exclusiveMinimum"] == 0
    assert math.isfinite(number["maximum"])


def test_choices_of_one_request_share_its_objectives(kept: TestClient) -> None:
    headers = {"x-slo-ttft-ms": "600000"}
    body = {"model": NAME, **BODIES["/v1/completions"], "n": 3}
    kept.post("/v1/completions", json=body, headers=headers).raise_for_status()
    name = "moecast_slo_requests_total{task=,verdict=kept}"
    wait_until(lambda: samples(kept)[name] == 3)
    assert complete(kept, max_tokens=1).status_code == chat(kept, max_tokens=1).status_code == 200
