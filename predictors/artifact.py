"""A fitted predictor as a folder: what `serve.py` loads, and what may come from a stranger.

    artifact/
      manifest.json          written last: what this is, for which model, from what, checksums
      state.safetensors      every learned tensor, calibration included
      index.faiss            only where the predictor searches
      NAME.index.faiss       the same of the member NAME of a blend

A blend is one artifact: its members' configurations lie in its own, and their tensors beside its
own, behind their names. No pickle. `kind` is looked up in `predictors.registry`; no import path is
read from a file.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import faiss
import pydantic
import safetensors
import torch
from safetensors.torch import load, save_file

from data.errors import DamagedFileError, SpecMismatchError
from data.files import atomic_dir, sha256_file, write_json
from data.schema import MoESpec
from predictors.base import FitReport, Predictor
from predictors.embedders.base import Embedder
from predictors.registry import embedder_class, predictor_class

logger = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
MANIFEST, STATE, INDEX = "manifest.json", "state.safetensors", "index.faiss"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class EmbedderEntry(_Strict):
    """Which embedder the predictor's vectors come from."""

    kind: str
    config: dict[str, Any]
    fingerprint: str


class PredictorEntry(_Strict):
    """How a predictor is constructed.

    Attributes:
        kind: Key of `predictors.registry.PREDICTORS`.
        config: Constructor arguments, without the embedder; `members`, where it has any, are
            entries like this one.
        embedder: Or None, if the predictor reads no text.
    """

    kind: str
    config: dict[str, Any]
    embedder: EmbedderEntry | None


class SpecEntry(_Strict):
    """`MoESpec`, field by field."""

    model_id: str
    num_experts: int
    top_k: int
    decoder_layers: tuple[int, ...]
    expert_bytes_per_layer: tuple[int, ...] | None
    hidden_size: int | None
    expert_intermediate_size: int | None
    fingerprint: str

    def spec(self) -> MoESpec:
        """The same as the project's own class."""
        return MoESpec.from_json(self.model_dump())


class Manifest(PredictorEntry):
    """Everything about an artifact but its tensors: the predictor's entry, and these.

    Attributes:
        schema_version: Of this layout.
        spec: The MoE that the predictor was fitted for.
        parents: Digest of each input: traces, configuration.
        fitted_requests: `routing.request_digest` of what it was fitted or calibrated on, so that
            those requests are known again in whatever file they stand.
        files: SHA-256 of every other file in the folder.
        fit_report: `FitReport` as plain values.
        metrics: What was measured before export.
        created_by: Versions of what wrote it; informative.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    spec: SpecEntry
    parents: dict[str, str]
    fitted_requests: tuple[str, ...] = ()
    files: dict[str, str]
    fit_report: dict[str, Any] | None
    metrics: dict[str, Any]
    created_by: dict[str, str]


def save_artifact(
    predictor: Predictor,
    path: Path,
    *,
    spec: MoESpec,
    parents: Mapping[str, str],
    fitted_requests: Sequence[str] = (),
    fit_report: FitReport | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write a fitted predictor to the folder ``path``, atomically, replacing what is there.

    Args:
        predictor: A fitted one.
        path: The artifact's folder.
        spec: The MoE it is for; may know more (fingerprint, sizes) than the traces did.
        parents: Digest of each input by name.
        fitted_requests: As of `Manifest`.
        fit_report: What fitting found.
        metrics: Plain values.

    Raises:
        ValueError: The predictor reads the future (oracle), or is not fitted.
        SpecMismatchError: It was fitted for another model.
    """
    if predictor.needs_truth:
        raise ValueError(
            f"predictor {predictor.kind!r} reads the recorded future: it judges traces and cannot "
            "be exported"
        )
    if difference := predictor.fitted_spec().mismatch(spec):
        raise SpecMismatchError(f"predictor {predictor.kind!r} is for another model: {difference}")
    embedder = predictor.embedder
    with atomic_dir(path) as folder:
        state = {name: tensor.contiguous() for name, tensor in predictor.tensors().items()}
        save_file(state, folder / STATE)
        for name, one in _index_files(predictor):
            one.save_index(folder / name)
        manifest = Manifest(
            kind=predictor.kind,
            config=predictor.config(),
            embedder=None
            if embedder is None
            else EmbedderEntry(
                kind=embedder.kind, config=embedder.config(), fingerprint=embedder.fingerprint
            ),
            spec=SpecEntry(**spec.to_json()),
            parents=dict(parents),
            fitted_requests=tuple(fitted_requests),
            files={file.name: sha256_file(file) for file in sorted(folder.iterdir())},
            fit_report=None if fit_report is None else asdict(fit_report),
            metrics=dict(metrics or {}),
            created_by={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
                "faiss": faiss.__version__,
            },
        )
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    logger.info("exported predictor %s to %s", predictor.kind, path)
    return path


def read_manifest(path: Path) -> Manifest:
    """The manifest of the artifact in folder ``path``, checked, without its files.

    Raises:
        FileNotFoundError: ``path`` is no artifact.
        DamagedFileError: The manifest is not what `save_artifact` writes, or of another version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no artifact: it has no {MANIFEST}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(file, f"not JSON ({error})") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise DamagedFileError(
            file, f"schema_version is {version!r}; this moecast reads {SCHEMA_VERSION}"
        )
    try:
        manifest = Manifest.model_validate(values)
        manifest.spec.spec()
    except ValueError as error:  # pydantic's is one
        raise DamagedFileError(file, f"not a manifest: {error}") from error
    if STATE not in manifest.files:
        raise DamagedFileError(file, f"has no checksum of {STATE}")
    return manifest


def load_artifact(path: Path, *, expect: MoESpec | None = None) -> Predictor:
    """Read a predictor that makes the same forecasts as the one that was saved.

    Args:
        path: The artifact's folder.
        expect: The MoE of the model that will be served, if there is one.

    Raises:
        FileNotFoundError: ``path`` is no artifact.
        SpecMismatchError: It was made for another model, or with an embedder that is another one
            here; the message has both sides.
        DamagedFileError: A file is missing or altered; the error names it.
        ValueError: Unknown predictor or embedder.
    """
    manifest = read_manifest(path)
    spec = manifest.spec.spec()
    if expect is not None and (difference := spec.mismatch(expect)):
        raise SpecMismatchError(
            f"artifact {path} was made for another model than the one to be served: {difference}"
        )
    state = b""  # which every manifest names
    for name, checksum in manifest.files.items():
        file = path / name
        if file.parent != path:
            raise DamagedFileError(path / MANIFEST, f"names a file outside the folder: {name}")
        if not file.is_file():
            raise DamagedFileError(file, "missing")
        if name == STATE:
            # Read once, and into memory: who maps the file sees what is written into it later, and
            # dies of a bus error when it is made shorter, as a copy over it begins with.
            state = file.read_bytes()
            found = hashlib.sha256(state).hexdigest()
        else:
            found = sha256_file(file)
        if found != checksum:
            raise DamagedFileError(file, "its SHA-256 is not the manifest's")
    predictor = _constructed(manifest, path)
    try:
        predictor.load_state(spec, load(state))
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise DamagedFileError(path / STATE, f"cannot be read ({error})") from error
    for name, one in _index_files(predictor):
        if name in manifest.files:
            one.load_index(path / name)
    return predictor


def artifact_digest(path: Path) -> str:
    """Hex SHA-256 that names the artifact's whole content, through its manifest's checksums."""
    read_manifest(path)
    return sha256_file(path / MANIFEST)


def _constructed(entry: PredictorEntry, path: Path) -> Predictor:
    config = dict(entry.config)
    if entry.embedder is not None:
        config["embedder"] = same_embedder(entry.embedder, path)
    try:
        if "members" in config:
            config["members"] = {
                name: _constructed(PredictorEntry.model_validate(member), path)
                for name, member in config["members"].items()
            }
        return predictor_class(entry.kind)(**config)
    except (TypeError, AttributeError, pydantic.ValidationError) as error:
        raise DamagedFileError(path / MANIFEST, f"config of {entry.kind}: {error}") from error


def _index_files(predictor: Predictor, prefix: str = "") -> Iterator[tuple[str, Predictor]]:
    """A predictor and its members, each with the file that its index is in, if it has one."""
    yield f"{prefix}{INDEX}", predictor
    for name, member in predictor.members.items():
        yield from _index_files(member, f"{prefix}{name}.")


def same_embedder(entry: EmbedderEntry, path: Path) -> Embedder:
    """The embedder that the artifact in folder ``path`` was made with.

    Raises:
        SpecMismatchError: Here it has other weights.
        ValueError: There is none of that kind.
    """
    embedder = embedder_class(entry.kind)(**entry.config)
    if embedder.fingerprint != entry.fingerprint:
        raise SpecMismatchError(
            f"artifact {path} was made with embedder {entry.kind!r} {entry.config} of fingerprint "
            f"{entry.fingerprint[:12]}; here that is {embedder.fingerprint[:12]}: other weights"
        )
    return embedder
