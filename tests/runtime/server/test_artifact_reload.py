"""A new artifact takes over between two tokens; a bad one never does."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from data.adapters import spec_of
from data.schema import MoESpec
from data.tiny_moe import TINY_MOE_DIR
from predictors.artifact import artifact_digest, load_artifact, save_artifact
from predictors.popularity import Popularity
from runtime.engine import attach
from runtime.offload import Offload
from runtime.server.app import create_app
from runtime.server.artifact_reload import ArtifactReloader, hear_hangups
from runtime.server.generation import GenerationEngine
from runtime.server.sequence import EngineUnavailableError, Piece
from tests.runtime.server.fakes import Listener, generate, samples, submit_one, wait_until


@pytest.fixture(scope="module")
def offloaded() -> Iterator[tuple[Any, MoESpec, Offload]]:
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()
    spec = spec_of(model)
    with attach(model, policy="forecast", slots=8, predictor=popularity(spec, 0)) as offload:
        yield model, spec, offload


def popularity(spec: MoESpec, favourite: int) -> Popularity:
    """Expects one expert of each layer above all."""
    predictor = Popularity()
    shares_LE = torch.full((spec.num_layers, spec.num_experts), 0.1)
    shares_LE[:, favourite] = 0.9
    predictor.load_state(spec, {"popularity_LE": shares_LE})
    return predictor


@pytest.fixture
def serving(
    offloaded: tuple[Any, MoESpec, Offload], tokenizer: Any, tmp_path: Path
) -> Iterator[tuple[GenerationEngine, ArtifactReloader, MoESpec, TestClient]]:
    model, spec, offload = offloaded
    save_artifact(popularity(spec, 1), tmp_path / "artifact", spec=spec, parents={})
    engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=offload, mode="batched")

    def swap(predictor: Any) -> None:
        engine.between_steps(lambda: offload.swap_predictor(predictor))

    with TestClient(create_app(engine, model_name="tiny")) as client:
        wait_until(lambda: engine.state == "ready")
        swap(load_artifact(tmp_path / "artifact"))
        with ArtifactReloader(
            find=lambda: tmp_path / "artifact",
            served=artifact_digest(tmp_path / "artifact"),
            spec=spec,
            swap=swap,
            poll_s=0.05,
        ) as reloader:
            engine.reloader = reloader
            yield engine, reloader, spec, client


def favourite(offload: Offload) -> int:
    """What the served predictor expects most."""
    observer = offload._row_observer()
    assert observer is not None
    request = next(iter(observer._named.values()), None)
    if request is None:  # just swapped in: it has seen no pass yet
        return -1
    assert request.forecast is not None
    return int(request.forecast.next_LE[0].argmax())


def test_a_new_artifact_takes_over_while_answers_are_under_way(
    serving: Any, offloaded: Any, tmp_path: Path
) -> None:
    engine, reloader, spec, client = serving
    _, _, offload = offloaded
    listener = Listener()
    running = submit_one(engine, listener, prompt_ids=[20], max_tokens=1500, ignore_eos=True)
    listener.next()
    wait_until(lambda: favourite(offload) == 1)
    save_artifact(popularity(spec, 5), tmp_path / "artifact", spec=spec, parents={})
    wait_until(lambda: reloader.num_reloads == 1)
    heard = listener.next()
    wait_until(lambda: favourite(offload) == 5)
    assert isinstance(heard, Piece)
    running.cancel()
    assert samples(client)["moecast_artifact_reloads_total"] == 1


def test_a_damaged_artifact_is_refused_and_the_old_one_goes_on(
    serving: Any, offloaded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, reloader, spec, client = serving
    _, _, offload = offloaded
    save_artifact(popularity(spec, 6), tmp_path / "new", spec=spec, parents={})
    for file in (tmp_path / "new").iterdir():
        if file.suffix == ".safetensors":
            file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    (tmp_path / "artifact").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "artifact")
    wait_until(lambda: reloader.num_refusals == 1)
    assert "SHA-256 is not the manifest's" in caplog.text
    assert generate(engine, [20], max_tokens=3, ignore_eos=True)[2] == "length"
    listener = Listener()
    running = submit_one(engine, listener, prompt_ids=[20], max_tokens=1500, ignore_eos=True)
    listener.next()
    wait_until(lambda: favourite(offload) == 1)
    running.cancel()
    found = samples(client)
    assert found["moecast_artifact_refusals_total"] == 1
    assert found["moecast_artifact_reloads_total"] == 0
    assert client.get("/health").status_code == 200


def test_sighup_looks_again_even_at_the_same(serving: Any) -> None:
    _, reloader, _, _ = serving
    os.kill(os.getpid(), signal.SIGHUP)
    wait_until(lambda: reloader.num_reloads == 1)


def test_an_artifact_that_is_gone_changes_nothing(serving: Any, tmp_path: Path) -> None:
    engine, reloader, _, _ = serving
    (tmp_path / "artifact" / "manifest.json").unlink()
    wait_until(lambda: reloader.num_refusals >= 1)
    assert generate(engine, [20], max_tokens=2, ignore_eos=True)[2] == "length"


def test_an_artifact_of_another_model_is_refused(serving: Any, tmp_path: Path) -> None:
    _, reloader, spec, _ = serving
    other = MoESpec(model_id="other", num_experts=4, top_k=2, decoder_layers=(0, 1))
    save_artifact(popularity(other, 1), tmp_path / "artifact", spec=other, parents={})
    wait_until(lambda: reloader.num_refusals == 1)
    assert reloader.num_reloads == 0


def test_nothing_is_swapped_once_the_engine_has_ended(serving: Any) -> None:
    engine, _, _, _ = serving
    engine.shutdown()
    with pytest.raises(EngineUnavailableError):
        engine.between_steps(lambda: None)


def test_a_change_that_fails_is_told_to_who_asked(serving: Any) -> None:
    engine, _, _, _ = serving

    def broken() -> None:
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        engine.between_steps(broken)
    assert engine.state == "ready"


def test_a_wrong_interval_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="artifact_reload_s=-1"):
        ArtifactReloader(
            find=lambda: None,
            served="",
            spec=None,
            swap=print,
            poll_s=-1,  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def spec() -> MoESpec:
    return MoESpec(model_id="tiny", num_experts=4, top_k=2, decoder_layers=(0, 1))


class Looked:
    """A reloader that polls, with a `find` and a `swap` that fail as often as a test says."""

    def __init__(self, spec: MoESpec, folder: Path) -> None:
        self.folder = folder
        self.find_errors: list[Exception] = []
        self.swap_errors: list[Exception] = []
        self.looks = 0
        self.swapped: list[Any] = []
        save_artifact(popularity(spec, 1), folder, spec=spec, parents={})
        self.reloader = ArtifactReloader(
            find=self.find, served="of another", spec=spec, swap=self.swap, poll_s=0.01
        )

    def find(self) -> Path:
        self.looks += 1
        if self.find_errors:
            raise self.find_errors.pop()
        return self.folder

    def swap(self, predictor: Any) -> None:
        if self.swap_errors:
            raise self.swap_errors.pop()
        self.swapped.append(predictor)


@pytest.mark.parametrize(
    "error", [KeyError("manifest"), FileNotFoundError("it vanished"), TypeError("list")], ids=repr
)
def test_whatever_a_look_raises_is_counted_and_the_next_one_succeeds(
    spec: MoESpec, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    looked = Looked(spec, tmp_path / "artifact")
    looked.find_errors = [error]
    with looked.reloader as reloader:
        wait_until(lambda: reloader.num_reloads == 1)
    assert reloader.num_refusals == 1
    assert str(error) in caplog.text


def test_what_stays_wrong_is_told_once(spec: MoESpec, tmp_path: Path) -> None:
    looked = Looked(spec, tmp_path / "artifact")
    looked.find_errors = [KeyError("manifest") for _ in range(1000)]
    with looked.reloader as reloader:
        wait_until(lambda: looked.looks > 5)
        assert reloader.num_refusals == 1
        looked.find_errors = [OSError("something else")]
        wait_until(lambda: reloader.num_reloads == 1)
    assert reloader.num_refusals == 2


def test_one_that_the_engine_had_no_time_for_is_tried_again(spec: MoESpec, tmp_path: Path) -> None:
    looked = Looked(spec, tmp_path / "artifact")
    looked.swap_errors = [EngineUnavailableError("the engine was busy for too long")]
    with looked.reloader as reloader:
        wait_until(lambda: reloader.num_reloads == 1)
    assert len(looked.swapped) == 1
    assert reloader.num_refusals == 1


def test_one_that_cannot_serve_is_not_tried_again_until_sighup(
    spec: MoESpec, tmp_path: Path
) -> None:
    looked = Looked(spec, tmp_path / "artifact")
    looked.swap_errors = [ValueError("it cannot serve")]
    with looked.reloader as reloader:
        wait_until(lambda: looked.looks > 5)
        assert (reloader.num_reloads, reloader.num_refusals) == (0, 1)
        reloader.request()
        wait_until(lambda: reloader.num_reloads == 1)


def test_sighup_without_a_predictor_is_told_and_kills_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = signal.getsignal(signal.SIGHUP)
    with hear_hangups():
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: "no predictor is served" in caplog.text)
    assert signal.getsignal(signal.SIGHUP) is before
