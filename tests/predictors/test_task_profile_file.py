"""A profile is read back as it was written, and one that was damaged or of another model is not."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from data.errors import DamagedFileError, SpecMismatchError
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.task_classifier import ClassifierReader
from predictors.task_profile import TaskProfile
from predictors.task_profile_file import MANIFEST, STATE, load_profile, save_profile
from tests.predictors.task_profiles import SPEC, profile_of

TABLES = ("use_GLE", "agreement_GL", "kl_GL", "answer_tokens_G")


def same(one: TaskProfile, other: TaskProfile) -> bool:
    return one.spec == other.spec and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in TABLES
    )


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    profile = profile_of()
    loaded = load_profile(save_profile(profile, tmp_path / "p"), expect=SPEC)
    assert same(loaded, profile)
    assert loaded.tasks == ("code", "talk")
    assert loaded.reader.config() == profile.reader.config()
    assert loaded.measured == {"residency": 0.25}


def test_a_classifier_is_read_back_with_its_embedder(tmp_path: Path) -> None:
    prompts = {"code": ["def f(): return 1"] * 2, "talk": ["good morning to you"] * 2}
    reader = ClassifierReader.fit(prompts, embedder=TokenMeanEmbedder())
    loaded = load_profile(save_profile(profile_of(reader=reader), tmp_path / "p"))
    assert [loaded.reader.read(texts[0]) for texts in prompts.values()] == [0, 1]


def test_embeddings_that_are_others_here_are_refused(tmp_path: Path) -> None:
    prompts = {"code": ["def"], "talk": ["good morning"]}
    reader = ClassifierReader.fit(prompts, embedder=TokenMeanEmbedder())
    path = save_profile(profile_of(reader=reader), tmp_path / "p")
    edit(path, lambda values: values["reader"]["embedder"].update(fingerprint="f" * 64))
    with pytest.raises(SpecMismatchError, match="other weights"):
        load_profile(path)


def edit(path: Path, change: object) -> None:
    values = json.loads((path / MANIFEST).read_text())
    change(values)  # type: ignore[operator]
    (path / MANIFEST).write_text(json.dumps(values))


def test_a_failed_writing_leaves_the_old_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = profile_of()
    path = save_profile(old, tmp_path / "p")

    def break_it(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("predictors.task_profile_file.write_json", break_it)
    with pytest.raises(OSError, match="disk full"):
        save_profile(profile_of(answer_tokens_G=(1.0, 2.0)), path)
    monkeypatch.undo()
    assert same(load_profile(path), old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no profile of tasks"):
        load_profile(tmp_path)


def test_a_profile_of_another_model_is_refused_with_both_sides(tmp_path: Path) -> None:
    path = save_profile(profile_of(), tmp_path / "p")
    other = dataclasses.replace(SPEC, num_experts=8)
    with pytest.raises(SpecMismatchError, match="x 4 experts.*x 8 experts"):
        load_profile(path, expect=other)


def test_altered_tables_are_refused(tmp_path: Path) -> None:
    path = save_profile(profile_of(), tmp_path / "p")
    state = bytearray((path / STATE).read_bytes())
    state[-1] ^= 1
    (path / STATE).write_bytes(bytes(state))
    with pytest.raises(DamagedFileError, match="SHA-256"):
        load_profile(path)
    (path / STATE).unlink()
    with pytest.raises(DamagedFileError, match="missing"):
        load_profile(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda values: values.update(schema_version=9), "schema_version"),
        (lambda values: values["reader"].update(kind="os.system"), "kind"),
        (lambda values: values["reader"].update(config={"words": 1}), "words"),
        (lambda values: values["reader"]["config"].update(fallback="poem"), "poem"),
        (lambda values: values["reader"].update(kind="classifier"), "embedder"),
        (lambda values: values.update(extra=1), "extra"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, change: object, complaint: str) -> None:
    path = save_profile(profile_of(), tmp_path / "p")
    edit(path, change)
    with pytest.raises(DamagedFileError, match=complaint):
        load_profile(path)
