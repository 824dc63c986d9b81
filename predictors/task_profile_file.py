"""A profile of tasks as a folder: what `python -m runtime.profile_tasks` leaves for `serve.py`.

    profile/
      manifest.json         written last: the model, how tasks are read, how it was measured
      state.safetensors     the tables, and what the reader learned

Like an artifact (`predictors.artifact`): written whole or not at all, with a checksum, no pickle,
no import path. Knows nothing of what the tables mean.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pydantic
import safetensors
from safetensors.torch import load_file, save_file

from data.errors import DamagedFileError, SpecMismatchError
from data.files import atomic_dir, sha256_file, write_json
from data.schema import MoESpec
from predictors.artifact import EmbedderEntry, SpecEntry, same_embedder
from predictors.task_classifier import ClassifierReader
from predictors.task_profile import TaskProfile
from predictors.task_reader import KeywordReader, TaskReader

logger = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
MANIFEST, STATE = "manifest.json", "state.safetensors"
_READER = "reader."  # in front of its tensors' names


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class _ReaderEntry(_Strict):
    kind: Literal["keywords", "classifier"]
    config: dict[str, Any]
    embedder: EmbedderEntry | None


class _Manifest(_Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    spec: SpecEntry
    reader: _ReaderEntry
    measured: dict[str, Any]
    files: dict[str, str]


def save_profile(profile: TaskProfile, path: Path) -> Path:
    """Write ``profile`` to the folder ``path``, atomically, replacing what is there."""
    reader = profile.reader
    embedder = reader.embedder if isinstance(reader, ClassifierReader) else None
    tables = {
        "use_GLE": profile.use_GLE,
        "agreement_GL": profile.agreement_GL,
        "kl_GL": profile.kl_GL,
        "answer_tokens_G": profile.answer_tokens_G,
    }
    learned = {f"{_READER}{name}": tensor for name, tensor in reader.tensors().items()}
    with atomic_dir(path) as folder:
        state = {name: tensor.contiguous() for name, tensor in (tables | learned).items()}
        save_file(state, folder / STATE)
        manifest = _Manifest(
            spec=SpecEntry(**profile.spec.to_json()),
            reader=_ReaderEntry(
                kind=reader.kind,  # type: ignore[arg-type]
                config=reader.config(),
                embedder=None
                if embedder is None
                else EmbedderEntry(
                    kind=embedder.kind, config=embedder.config(), fingerprint=embedder.fingerprint
                ),
            ),
            measured=dict(profile.measured),
            files={STATE: sha256_file(folder / STATE)},
        )
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    logger.info("wrote the profile of tasks %s to %s", ", ".join(profile.tasks), path)
    return path


def load_profile(path: Path, *, expect: MoESpec | None = None) -> TaskProfile:
    """Read what `save_profile` wrote.

    Args:
        path: The folder.
        expect: The MoE of the model that will be served, if there is one.

    Raises:
        FileNotFoundError: ``path`` is no profile.
        SpecMismatchError: It was made for another model, or with other embeddings than are here.
        DamagedFileError: A file is missing, altered, or not what it should be.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no profile of tasks: it has no {MANIFEST}")
    try:
        manifest = _Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
        spec = manifest.spec.spec()
    except ValueError as error:  # of JSON, of pydantic, of the spec
        raise DamagedFileError(file, f"not a manifest: {error}") from error
    if expect is not None and (difference := spec.mismatch(expect)):
        raise SpecMismatchError(f"profile {path} was made for another model: {difference}")
    state = path / STATE
    if not state.is_file():
        raise DamagedFileError(state, "missing")
    if sha256_file(state) != manifest.files.get(STATE):
        raise DamagedFileError(state, "its SHA-256 is not the manifest's")
    try:
        tensors = load_file(state)
        learned = {
            name.removeprefix(_READER): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_READER)
        }
        return TaskProfile(
            spec=spec,
            reader=_reader(manifest.reader, learned, path),
            measured=manifest.measured,
            **tensors,
        )
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, SpecMismatchError):
            raise
        raise DamagedFileError(state, f"not a profile: {error}") from error


def _reader(entry: _ReaderEntry, learned: Mapping[str, Any], path: Path) -> TaskReader:
    if entry.kind == "keywords":
        return KeywordReader(**entry.config)
    if entry.embedder is None:
        raise ValueError("a classifier needs an embedder, and none is named")
    return ClassifierReader(**entry.config, **learned, embedder=same_embedder(entry.embedder, path))
