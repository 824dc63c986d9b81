"""What a trace store says of itself: its manifest, and the footer of each shard.

Read strictly, because strangers write such files too: an unknown key or a wrong type is reported
with the file's name. Knows nothing of rows and columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from data.errors import DamagedFileError, OutputExistsError
from data.files import sha256_file
from data.schema import MoESpec, ProbsKind, Split

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
FOOTER_KEY = b"moecast"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """How requests are cut, batched, continued and recorded.

    Args:
        max_prompt_tokens: Longer prompts are cut behind this many tokens.
        max_new_tokens: How many tokens to generate at most; 0 observes the prompts alone.
        batch_size: Requests that run together. The last bits of a float depend on it.
        temperature: 0 decodes greedily.
        top_p: Sample among the likeliest tokens that together have this probability.
        seed: Of sampling, and of the split.
        keep_router_probs: Record the probabilities of all E experts, not only of the K that ran:
            FineMoE's expert maps, at E/K times the size.

    Raises:
        ValueError: A value is out of range.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    max_prompt_tokens: int = 96
    max_new_tokens: int = 32
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_router_probs: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = {"max_prompt_tokens": 1, "max_new_tokens": 0, "batch_size": 1, "temperature": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {minimum}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")


def _to_spec(value: Any) -> MoESpec:
    if isinstance(value, MoESpec):
        return value
    try:
        return MoESpec.from_json(value)
    except TypeError as error:  # which pydantic would not report as a fault of the file
        raise ValueError(str(error)) from error


class StoreInputs(_Strict):
    """Everything besides the requests that decides what a store holds.

    Attributes:
        spec: The MoE; its fingerprint is the digest of the model's config.
        revision: The model's commit, where it has one.
        router_digest: Digest of the router weights: tells checkpoints of one config apart.
        dtype: What the model ran in.
        source: Name of the prompts' source.
        source_digest: Digest of its content.
        settings: How requests were cut, batched, continued and recorded; None for those of a
            server's clients, who each decide it.
        probs_kind: What the recorded probabilities are.
        requests_per_shard: How requests are cut into shards.
    """

    spec: Annotated[
        MoESpec, pydantic.PlainValidator(_to_spec), pydantic.PlainSerializer(MoESpec.to_json)
    ]
    revision: str | None
    router_digest: str
    dtype: str
    source: str
    source_digest: str
    settings: CollectSettings | None
    probs_kind: ProbsKind
    requests_per_shard: int


class RequestEntry(_Strict):
    """One request: its split, and where its row lies."""

    request_id: str
    split: Split
    shard: int
    row: int


class ShardEntry(_Strict):
    """One file of a complete store."""

    file: str
    sha256: str
    num_bytes: int


class Manifest(_Strict):
    """What ``manifest.json`` holds; see `TraceStore.digest` for the digest."""

    schema_version: Literal[1]
    digest: str
    num_requests: int
    num_tokens: int
    inputs: StoreInputs
    requests: tuple[RequestEntry, ...]
    shards: tuple[ShardEntry, ...]


class Footer(_Strict):
    """What a shard says of itself."""

    schema_version: Literal[1]
    inputs: StoreInputs
    requests_digest: str
    request_ids: tuple[str, ...]
    trace_digests: tuple[str, ...]
    num_tokens: int


def verify(path: Path, shard: ShardEntry) -> None:
    """Compare a shard of the store in ``path`` with its checksum; DamagedFileError names it."""
    file = path / shard.file
    if (sha256 := sha256_file(file)) != shard.sha256:
        raise DamagedFileError(file, f"its SHA-256 is {sha256}, not {shard.sha256}")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the store in ``path``; see `TraceStore.open` for the errors."""
    file = path / MANIFEST
    if not file.is_file():
        if any(path.glob("shard-*.parquet")):
            raise ValueError(
                f"{path}: its collection was interrupted; the same command again completes it"
            )
        raise ValueError(f"{path}: there is no trace store in this folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values["schema_version"]
        if version == SCHEMA_VERSION:
            return Manifest.model_validate(values)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(file, str(error)) from error
    raise _version_error(path, version)


def read_footer(file: Path) -> Footer:
    """Read what a shard says of itself.

    Raises:
        OutputExistsError: It is a Parquet file of something else.
        DamagedFileError: It cannot be read.
        ValueError: It is of another schema version.
    """
    try:
        metadata = pq.read_metadata(file).metadata or {}
        values = json.loads(metadata[FOOTER_KEY])
        version = values["schema_version"]
        if version == SCHEMA_VERSION:
            return Footer.model_validate(values)
    except KeyError:
        raise OutputExistsError(file, "a Parquet file that is no shard of a trace store") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DamagedFileError(file, str(error)) from error
    raise _version_error(file, version)


def _version_error(path: Path, version: Any) -> ValueError:
    return ValueError(
        f"{path}: schema version {version}, but this release reads and writes version "
        f"{SCHEMA_VERSION} only: collect again into another folder"
    )
