"""The entry point: what is wrong with its settings is said before a model is loaded."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

import serve
from conf import schema
from data.adapters import spec_of
from data.errors import ModelNotFoundError
from data.models import load_model
from data.schema import MoESpec
from data.tiny_moe import TINY_MOE_DIR
from predictors.artifact import artifact_digest, save_artifact
from predictors.popularity import Popularity
from runtime.scheduler import StepCosts
from runtime.server.logs import JsonFormatter

SLO = ["serve.scheduler=slo"]


def settings(tmp_path: Path, *overrides: str) -> Any:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("serve", overrides=[f"paths.root={tmp_path}", *overrides])


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOECAST_API_KEY", raising=False)


@pytest.fixture
def root_formatters() -> Iterator[None]:
    handlers = logging.getLogger().handlers
    before = [handler.formatter for handler in handlers]
    yield
    for handler, formatter in zip(handlers, before, strict=True):
        handler.setFormatter(formatter)


def test_the_check_passes_and_shows_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.run(settings(tmp_path, "check=true", "policy=lru", "budget=25%")) == 0
    out = capsys.readouterr().out
    assert "layer 7" in out
    assert out.endswith("check passed\n")


def test_a_failed_check_is_a_failed_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it(model: Any, **kwargs: Any) -> Any:
        model.model.norm.weight.data.mul_(1.01)
        return attach(model, **kwargs)

    attach = serve.attach
    monkeypatch.setattr(serve, "attach", break_it)
    assert serve.run(settings(tmp_path, "check=true", "policy=lru")) == 1
    assert capsys.readouterr().out.endswith("check FAILED\n")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["serve.host=0.0.0.0"], "there is no API key: set MOECAST_API_KEY"),
        (["serve.api_key_file=/no/such/file"], "serve.api_key_file=/no/such/file: cannot be read"),
        (["serve.port=70000"], "port=70000"),
        (["serve.log=xml"], "serve.log=xml: must be one of text, json"),
        (["serve.limits.max_requests=0"], "max_requests=0"),
        (["serve.slo.ttft_s=1"], "serve.slo.ttft_s=1: serve.scheduler=fifo keeps no objectives"),
        ([*SLO, "serve.slo.tpot_s=soon"], "serve.slo.tpot_s=soon: must be a number of seconds"),
        ([*SLO, "serve.slo.ttft_s=0"], "ttft_s=0: must be above 0"),
        ([*SLO, "serve.slo.max_overtaken=many"], "serve.slo.max_overtaken=many: must be a whole"),
        ([*SLO, "serve.slo.step_costs_s=[1,2]"], r"serve.slo.step_costs_s=\[1, 2\]: must be \["),
        ([*SLO, "serve.slo.step_costs_s=[-1,1,0]"], "fixed_s=-1: must be at least 0"),
        ([*SLO, "serve.engine=single"], "serve.scheduler=slo: with serve.engine=single"),
        (["serve.port=0", "model=pretrained", "model.id=/proc"], "holds no config.json"),
        (
            ["serve.port=0", "artifact=no/such/artifact", "policy=forecast"],
            "is no artifact.*policy=lru, which needs none",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_said_with_what_to_change(
    tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError, ModelNotFoundError), match=complaint):
        serve.run(settings(tmp_path, *overrides))


def test_a_taken_port_is_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(serve, "load_model", load_model)
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"serve.port={port}: another program"):
            serve.run(settings(tmp_path, f"serve.port={port}"))


def test_objectives_are_those_of_the_settings(tmp_path: Path) -> None:
    assert serve.objectives_of(settings(tmp_path)) is None
    costs = "serve.slo.step_costs_s=[0.5,0.25,0]"
    objectives = serve.objectives_of(settings(tmp_path, *SLO, "serve.slo.ttft_s=2", costs))
    assert objectives is not None
    assert objectives.costs == StepCosts(fixed_s=0.5, sequence_s=0.25, prompt_token_s=0)


@pytest.mark.usefixtures("root_formatters")
def test_logs_are_json_if_wanted(tmp_path: Path) -> None:
    serve.run(settings(tmp_path, "check=true", "policy=lru", "serve.log=json"))
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    assert all(isinstance(formatter, JsonFormatter) for formatter in formatters)


def test_keys_of_the_environment_open_the_server_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECAST_API_KEY", "abc")
    options = serve.server_options(settings(tmp_path, "serve.host=0.0.0.0"))
    assert options.api_keys == ("abc",)
    assert options.limits.max_body_bytes == 2 * 2**20


def popularity(spec: MoESpec, share: float) -> Popularity:
    predictor = Popularity()
    shares_LE = torch.full((spec.num_layers, spec.num_experts), share)
    predictor.load_state(spec, {"popularity_LE": shares_LE})
    return predictor


@pytest.fixture(scope="module")
def tiny_spec() -> MoESpec:
    model, _ = load_model(str(TINY_MOE_DIR), dtype="float32")
    return spec_of(model, model_id="tiny")


def test_sighup_does_not_end_a_server_without_a_predictor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its default would: the process of the tests would be gone."""

    def hang_up(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
    try:
        monkeypatch.setattr(serve, "serve", hang_up)
        assert serve.run(settings(tmp_path, "policy=lru", "serve.port=0")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == []
    assert "SIGHUP: no predictor is served" in caplog.text


def test_an_artifact_that_was_written_while_the_model_was_attached_is_loaded_on_sighup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_spec: MoESpec
) -> None:
    artifact = tmp_path / "artifact"
    save_artifact(popularity(tiny_spec, 0.1), artifact, spec=tiny_spec, parents={})
    loaded = artifact_digest(artifact)
    served: list[str] = []

    class Reloader(serve.ArtifactReloader):  # type: ignore[name-defined, misc]
        def __init__(self, **kwargs: Any) -> None:
            served.append(kwargs["served"])
            super().__init__(**kwargs)

    attach = serve.attach

    def attach_slowly(*args: Any, **kwargs: Any) -> Any:
        save_artifact(popularity(tiny_spec, 0.2), artifact, spec=tiny_spec, parents={})
        return attach(*args, **kwargs)

    monkeypatch.setattr(serve, "ArtifactReloader", Reloader)
    monkeypatch.setattr(serve, "attach", attach_slowly)
    monkeypatch.setattr(serve, "serve", lambda *args, **kwargs: None)
    assert serve.run(settings(tmp_path, f"artifact={artifact}", "serve.port=0")) == 0
    assert served == [loaded]
    assert artifact_digest(artifact) != loaded


def test_artifacts_of_other_models_are_told_at_the_start_and_not_at_each_look(
    tmp_path: Path, tiny_spec: MoESpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = MoESpec(model_id="other", num_experts=4, top_k=2, decoder_layers=(0, 1))
    save_artifact(popularity(other, 0.1), tmp_path / "artifacts" / "x", spec=other, parents={})
    cfg = settings(tmp_path)
    assert serve.find_artifact(cfg, tiny_spec) is None
    assert caplog.text.count("passed over") == 1
    assert serve.find_artifact(cfg, tiny_spec, level=logging.DEBUG) is None
    assert caplog.text.count("passed over") == 1
