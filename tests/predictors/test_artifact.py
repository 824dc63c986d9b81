import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DamagedFileError, SpecMismatchError
from data.schema import TraceSet
from predictors import registry
from predictors.artifact import artifact_digest, load_artifact, read_manifest, save_artifact
from predictors.base import Predictor
from predictors.eamc import Eamc
from predictors.finemoe import FineMoE
from predictors.markov import Markov
from predictors.none import Silent
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.semantic import Semantic
from predictors.task import Task
from predictors.trajectory import Trajectory
from tests.predictors.fakes import SPEC, WordEmbedder, make_traces, random_traces

MAKERS: dict[str, Callable[[], Predictor]] = {
    "popularity": lambda: Popularity(gamma=0.9),
    "previous_token": PreviousToken,
    "eamc": lambda: Eamc(neighbours=3),
    "markov": lambda: Markov(num_layers_ahead=1),
    "none": Silent,
    "task": lambda: Task(
        hidden_size=8, depth=1, window=2, epochs=1, trainer={"accelerator": "cpu"}
    ),
    "semantic": lambda: Semantic(embedder=WordEmbedder(), neighbours=3),
    "semantic of requests": lambda: Semantic(
        embedder=WordEmbedder(), granularity="request", adapt_tokens=None
    ),
    "trajectory": lambda: Trajectory(prefetch_distance=2, capacity=30),
    "finemoe": lambda: FineMoE(embedder=WordEmbedder(), prefetch_distance=2, neighbours=3),
    "finemoe without prompts": lambda: FineMoE(prefetch_distance=1),
}


@pytest.fixture(autouse=True)
def word_embedder_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.EMBEDDERS, "words", WordEmbedder)


def export(path: Path, name: str = "semantic", traces: TraceSet | None = None) -> Path:
    predictor = MAKERS[name]()
    traces = random_traces() if traces is None else traces
    report = predictor.fit(traces)
    return save_artifact(
        predictor,
        path,
        spec=traces.spec,
        parents={"traces": traces.digest},
        fit_report=report,
        metrics={"recall": 0.5},
    )


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_predictor_makes_identical_forecasts(tmp_path: Path, name: str) -> None:
    traces = random_traces()
    predictor = MAKERS[name]()
    predictor.fit(traces)
    save_artifact(predictor, tmp_path / "a", spec=SPEC, parents={})
    again = load_artifact(tmp_path / "a", expect=SPEC)
    assert again.kind == predictor.kind
    assert again.config() == predictor.config()
    for said, repeated in zip(
        predictor.walk(traces[3]).forecasts, again.walk(traces[3]).forecasts, strict=True
    ):
        if said is None or repeated is None:
            assert said is repeated
            continue
        assert torch.equal(said.next_LE, repeated.next_LE)
        assert torch.equal(said.forecast_LE, repeated.forecast_LE)


def test_an_empty_store_can_be_saved_and_loaded(tmp_path: Path) -> None:
    export(tmp_path / "a", traces=make_traces({}))
    assert set(load_artifact(tmp_path / "a").walk(random_traces()[0]).forecasts) == {None}


def test_manifest_names_parents_files_and_what_was_found(tmp_path: Path) -> None:
    manifest = read_manifest(export(tmp_path / "a"))
    assert manifest.kind == "semantic"
    assert manifest.parents == {"traces": "fake"}
    assert set(manifest.files) == {"state.safetensors", "index.faiss"}
    assert manifest.spec.spec() == SPEC
    assert manifest.embedder is not None
    assert manifest.embedder.kind == "words"
    assert manifest.fit_report is not None
    assert manifest.fit_report["details"]["calibrated"] is True
    assert "_target_" not in (tmp_path / "a" / "manifest.json").read_text()


def test_only_predictors_that_search_have_an_index(tmp_path: Path) -> None:
    assert set(read_manifest(export(tmp_path / "a", "popularity")).files) == {"state.safetensors"}


def test_saving_again_replaces_the_old_artifact_and_leaves_nothing_else(tmp_path: Path) -> None:
    export(tmp_path / "a", "semantic")
    export(tmp_path / "a", "popularity")
    assert load_artifact(tmp_path / "a").kind == "popularity"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / "index.faiss").exists()


def test_digest_names_the_content(tmp_path: Path) -> None:
    one = artifact_digest(export(tmp_path / "a", "popularity"))
    other = artifact_digest(export(tmp_path / "b", "popularity", random_traces(seed=1)))
    assert one != other
    assert one == artifact_digest(tmp_path / "a")


def test_oracle_cannot_be_exported(tmp_path: Path) -> None:
    predictor = Oracle()
    predictor.fit(random_traces())
    with pytest.raises(ValueError, match="oracle.*cannot be exported"):
        save_artifact(predictor, tmp_path / "a", spec=SPEC, parents={})
    assert not (tmp_path / "a").exists()


def test_an_unfitted_predictor_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        save_artifact(Popularity(), tmp_path / "a", spec=SPEC, parents={})


def test_another_model_is_refused_with_both_specs(tmp_path: Path) -> None:
    export(tmp_path / "a")
    other = replace(SPEC, model_id="other", num_experts=8)
    with pytest.raises(SpecMismatchError, match=r"fake \(2 .* x 4 .*other \(2 .* x 8 "):
        load_artifact(tmp_path / "a", expect=other)
    with pytest.raises(SpecMismatchError, match=r"fake .*other"):
        save_artifact(load_artifact(tmp_path / "a"), tmp_path / "b", spec=other, parents={})


def test_another_checkpoint_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    spec = replace(SPEC, fingerprint="aaaa")
    export(tmp_path / "a", "popularity", replace(random_traces(), spec=spec))
    with pytest.raises(SpecMismatchError, match="fingerprint aaaa.*bbbb"):
        load_artifact(tmp_path / "a", expect=replace(SPEC, fingerprint="bbbb"))


def test_an_embedder_with_other_weights_is_refused_with_both_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Retrained(WordEmbedder):
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            self.fingerprint = "retrained"

    export(tmp_path / "a")
    monkeypatch.setitem(registry.EMBEDDERS, "words", Retrained)
    with pytest.raises(SpecMismatchError, match="cats-ships-a.*retrained"):
        load_artifact(tmp_path / "a")


@pytest.mark.parametrize("name", ["state.safetensors", "index.faiss"])
def test_an_altered_file_is_named(tmp_path: Path, name: str) -> None:
    file = export(tmp_path / "a") / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match="SHA-256") as caught:
        load_artifact(tmp_path / "a")
    assert caught.value.path == file


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_written_into_the_files_later_changes_nothing(tmp_path: Path, name: str) -> None:
    """A copy over a served artifact begins by cutting it; were it mapped, that would kill us."""
    path, trace = export(tmp_path / "a", name), random_traces()[3]
    expected, loaded = load_artifact(path).walk(trace), load_artifact(path)
    for file in path.iterdir():
        with file.open("r+b") as content:  # in place, as a copy does it; no shorter, to be safe
            content.write(bytes(file.stat().st_size))
    for said, wanted in zip(loaded.walk(trace).forecasts, expected.forecasts, strict=True):
        if wanted is None:
            assert said is None
        else:
            assert said is not None
            assert torch.equal(said.next_LE, wanted.next_LE)


@pytest.mark.parametrize("name", ["state.safetensors", "index.faiss"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    file = export(tmp_path / "a") / name
    file.unlink()
    with pytest.raises(DamagedFileError, match="missing") as caught:
        load_artifact(tmp_path / "a")
    assert caught.value.path == file


def test_an_index_of_other_records_is_named(tmp_path: Path) -> None:
    """Right checksum, wrong content: an index swapped in together with its manifest entry."""
    export(tmp_path / "a")
    export(tmp_path / "b", traces=random_traces(num_requests=40))
    index = (tmp_path / "b" / "index.faiss").read_bytes()
    (tmp_path / "a" / "index.faiss").write_bytes(index)
    files = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    theirs = json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]
    edit_manifest(tmp_path / "a", files={**files, "index.faiss": theirs["index.faiss"]})
    with pytest.raises(DamagedFileError, match=r"index\.faiss.*20 vectors.*records"):
        load_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2; this moecast reads 1"),
        ({"surprise": 1}, "surprise"),
        ({"spec": {"num_experts": 4}}, "top_k"),
        ({"files": {}}, r"no checksum of state\.safetensors"),
        ({"config": {"neighbors": 3}}, "neighbors"),
    ],
    ids=["version", "unknown key", "missing keys", "no files", "unknown option"],
)
def test_a_manifest_that_we_did_not_write_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    export(tmp_path / "a")
    edit_manifest(tmp_path / "a", **changes)
    with pytest.raises(DamagedFileError, match=message):
        load_artifact(tmp_path / "a")


def test_a_file_outside_the_folder_is_never_read(tmp_path: Path) -> None:
    path = export(tmp_path / "a", "popularity")
    files = read_manifest(path).files
    edit_manifest(path, files={**files, "../secret": "0" * 64})
    with pytest.raises(DamagedFileError, match=r"manifest\.json.*outside the folder: \.\./secret"):
        load_artifact(path)


def test_a_manifest_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = export(tmp_path / "a")
    (path / "manifest.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"manifest\.json is damaged: not JSON"):
        load_artifact(path)


def test_a_folder_that_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no artifact: it has no manifest\.json"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("kind", ["semantix", "predictors.semantic.Semantic"])
def test_an_unknown_kind_lists_what_exists_and_imports_nothing(tmp_path: Path, kind: str) -> None:
    path = export(tmp_path / "a")
    edit_manifest(path, kind=kind)
    with pytest.raises(ValueError, match=f"{kind}.*{', '.join(sorted(registry.PREDICTORS))}"):
        load_artifact(path)


def test_an_unknown_embedder_lists_what_exists(tmp_path: Path) -> None:
    path = export(tmp_path / "a")
    embedder = json.loads((path / "manifest.json").read_text())["embedder"]
    edit_manifest(path, embedder={**embedder, "kind": "vectors"})
    with pytest.raises(ValueError, match="vectors.*sentence, token_mean"):
        load_artifact(path)
