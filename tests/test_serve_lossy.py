"""`serve.mode=resident_only`: all says so, residents follow tasks, what cannot be is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import serve
from data.adapters import spec_of
from data.errors import SpecMismatchError
from data.models import load_model
from data.schema import MoESpec
from data.tiny_moe import TINY_MOE_DIR
from predictors.artifact import save_artifact
from predictors.popularity import Popularity
from predictors.task import Task
from predictors.task_profile_file import save_profile
from tests.predictors.task_profiles import profile_of
from tests.runtime.server.fakes import samples, wait_until
from tests.test_serve import settings


@pytest.fixture(scope="module")
def spec() -> MoESpec:
    model, _ = load_model(str(TINY_MOE_DIR), dtype="float32")
    return spec_of(model)


@pytest.fixture
def profile(tmp_path: Path, spec: MoESpec) -> Path:
    return save_profile(profile_of(spec=spec), tmp_path / "profile")


def run(monkeypatch: pytest.MonkeyPatch, cfg: Any, ask: Callable[[TestClient], None]) -> None:
    """Start a server as the command does, and ask it instead of listening to the network."""

    def answer(app: Any, *, reserved: Any, drain_s: float) -> None:
        with TestClient(app) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            ask(client)

    monkeypatch.setattr(serve, "serve", answer)
    assert serve.run(cfg) == 0


def lossy(tmp_path: Path, profile: Path, *overrides: str) -> Any:
    fixed = ["serve.port=0", "serve.mode=resident_only", f"serve.task_profile={profile}"]
    return settings(tmp_path, *fixed, "budget=50%", "serve.resident_period=1", *overrides)


def complete(client: TestClient, prompt: str) -> str:
    body = {"model": "tiny_moe", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def test_the_mode_names_itself_and_residents_follow_the_requests(
    tmp_path: Path,
    profile: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    seen: list[dict[str, float]] = []

    def ask(client: TestClient) -> None:
        assert client.get("/v1/models").json()["data"][0]["mode"] == "resident_only"
        for prompt in ("def f(x):", "def g(x):", "hello there"):
            complete(client, prompt)
            seen.append(samples(client))

    run(monkeypatch, lossy(tmp_path, profile), ask)
    first, second, third = seen
    assert first["moecast_expert_lossy{mode=resident_only}"] == 1
    assert third["moecast_expert_requests_total{task=code}"] == 2
    assert third["moecast_expert_requests_total{task=talk}"] == 1
    assert second["moecast_expert_moved_total"] == first["moecast_expert_moved_total"]
    # 16 of 32 experts in 8 layers: from code's half to talk's.
    assert third["moecast_expert_moved_total"] == second["moecast_expert_moved_total"] + 8 * 16
    assert third["moecast_expert_resident_plans_total"] == 3
    assert third["moecast_expert_cache_misses_total{reason=loaded}"] == 0
    assert caplog.text.count("LOSSY") >= 2
    assert "mode resident_only (LOSSY)" in caplog.text  # in the line that says how it is attached


def test_batches_are_groups_that_are_decided_for_together(
    tmp_path: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(client: TestClient) -> None:
        prompts = ["def f(x):", "def g(x):", "hello there", "hello you"]
        body = {"model": "tiny_moe", "prompt": prompts, "max_tokens": 4, "temperature": 0}
        assert len(client.post("/v1/completions", json=body).json()["choices"]) == 4
        found = samples(client)
        assert found["moecast_expert_resident_plans_total"] == 2
        assert found["moecast_expert_layers_changed_total"] == 2 * 8
        assert found["moecast_expert_cache_misses_total{reason=loaded}"] == 0

    batched = ["serve.engine=batched", "serve.resident_period=2"]
    run(monkeypatch, lossy(tmp_path, profile, *batched), ask)


def test_without_it_a_server_is_lossless_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def ask(client: TestClient) -> None:
        assert client.get("/v1/models").json()["data"][0]["mode"] == "lossless"
        assert not any("lossy" in name for name in samples(client))

    run(monkeypatch, settings(tmp_path, "serve.port=0", "policy=lru"), ask)
    assert "LOSSY" not in caplog.text


def test_all_experts_resident_answer_as_the_lossless_server_does(
    tmp_path: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def ask(client: TestClient) -> None:
        said.append(complete(client, "def f(x):"))

    run(monkeypatch, lossy(tmp_path, profile, "budget=100%"), ask)
    run(monkeypatch, settings(tmp_path, "serve.port=0", "policy=lru"), ask)
    assert said[0] == said[1]


def test_an_artifact_that_remembers_requests_says_what_tasks_use(
    tmp_path: Path, profile: Path, spec: MoESpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Task(epochs=1, window=2, period=1, hidden_size=8, depth=1)
    shape = (8, spec.num_layers, spec.num_experts)
    stream_NLE = torch.rand(shape, generator=torch.Generator().manual_seed(0)) / 8
    predictor.fit_streams(stream_NLE, stream_NLE[:3])
    predictor.spec = spec
    artifact = save_artifact(predictor, tmp_path / "artifact", spec=spec, parents={})
    moved: list[float] = []

    def ask(client: TestClient) -> None:
        for _ in range(2):
            complete(client, "def f(x):")
            moved.append(samples(client)["moecast_expert_moved_total"])

    run(monkeypatch, lossy(tmp_path, profile, f"artifact={artifact}"), ask)
    assert moved[1] > moved[0]  # what was profiled has given way to what the first one used


def test_an_artifact_that_remembers_none_is_refused(
    tmp_path: Path, profile: Path, spec: MoESpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    popular = Popularity()
    popular.load_state(spec, {"popularity_LE": torch.zeros(spec.num_layers, spec.num_experts)})
    artifact = save_artifact(popular, tmp_path / "artifact", spec=spec, parents={})
    monkeypatch.setattr(serve, "serve", lambda *_, **__: None)
    with pytest.raises(ValueError, match="'popularity' does not read finished requests"):
        serve.run(lossy(tmp_path, profile, f"artifact={artifact}"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["serve.mode=lossy"], "serve.mode=lossy: must be one of lossless, resident_only"),
        (["serve.mode=lossless"], "serve.task_profile=.*: only for serve.mode=resident_only"),
        (["serve.task_profile=null"], "needs serve.task_profile; python -m runtime.profile_tasks"),
        (["serve.engine=batched"], "serve.resident_period=1 would make batches of one"),
        (
            ["serve.engine=batched", "serve.resident_period=4", "artifact=some"],
            "would learn from requests that run alone",
        ),
        (["serve.record=traces"], "serve.record: routing is not the model's own"),
        (["check=true"], "nothing to compare"),
    ],
    ids=str,
)
def test_what_the_mode_cannot_go_with_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], complaint: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(serve, "load_model", load)
    with pytest.raises(ValueError, match=complaint):
        serve.run(lossy(tmp_path, tmp_path / "none", *overrides))


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", "single"), ("single", "single"), ("batched", "batched")]
)
def test_sequences_run_one_by_one_unless_batches_are_asked_for(
    tmp_path: Path, profile: Path, asked: str, used: str
) -> None:
    cfg = lossy(tmp_path, profile, f"serve.engine={asked}", "serve.resident_period=2")
    assert serve.engine_mode(cfg, torch.device("cpu")) == used


def test_an_engine_that_is_none_is_no_other(
    tmp_path: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "serve", lambda *_, **__: None)
    with pytest.raises(ValueError, match="serve.engine=grouped: must be one of"):
        serve.run(lossy(tmp_path, profile, "serve.engine=grouped"))


def test_a_profile_that_is_none_or_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "serve", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="is no profile of tasks"):
        serve.run(lossy(tmp_path, tmp_path / "none"))
    other = save_profile(profile_of(), tmp_path / "other")
    with pytest.raises(SpecMismatchError, match="another model"):
        serve.run(lossy(tmp_path, other))
