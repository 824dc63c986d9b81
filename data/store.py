"""The trace store: a folder of Parquet shards, one row per request, and a manifest written last.

    store/
      shard-00000.parquet   a fixed group of requests, each its own row group
      ...
      manifest.json         what was collected from what, where each request lies, checksums

Every shard carries, in its footer, the inputs that it was made from: an interrupted collection is
told from a foreign folder without any further file, and goes on where it stopped. Columns have
explicit `datasets.Features`, so ``datasets.load_dataset("parquet", data_files=...)`` reads the
shards too. Our own reader goes through pyarrow: it keeps uint8 and float16 as they are, reads one
request at a time from the memory-mapped file, and needs no cache folder anywhere.

Knows nothing of models, prompts or how traces come about. `store_rows` holds the columns,
`store_manifest` what a store says of itself.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import DamagedFileError, OutputExistsError
from data.files import atomic_path, digest_json, sha256_file, write_json
from data.schema import ProbsKind, Split, Trace
from data.store_manifest import (
    FOOTER_KEY,
    MANIFEST,
    SCHEMA_VERSION,
    CollectSettings,
    Footer,
    Manifest,
    RequestEntry,
    ShardEntry,
    StoreInputs,
    read_footer,
    read_manifest,
    verify,
)
from data.store_rows import check, features_of, one_row, trace_digest, value_of

__all__ = ["MANIFEST", "CollectSettings", "StoreInputs", "TraceStore", "TraceStoreWriter"]

_OPEN_SHARDS = 16  # memory-mapped files held open by a reader


class TraceStore:
    """A complete trace store, read lazily; implements `data.schema.TraceSet`.

    ``store[i]`` decodes one request. Each shard's checksum is verified when it is first read, its
    presence and size when the store is opened.

    Attributes:
        spec: The MoE that was observed.
        split: The stored split of each request id, in the order of the store.
        digest: Names the content: spec, kind of probabilities, split and traces. How they were cut
            into shards, when, by what command and under what name of the model does not matter.
        probs_kind: What the recorded probabilities are.
        path: The folder.
        manifest: Everything else that is known about the collection.
    """

    def __init__(self, *, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.spec = manifest.inputs.spec
        self.split: Mapping[str, Split] = {
            entry.request_id: entry.split for entry in manifest.requests
        }
        self.digest = manifest.digest
        self.probs_kind: ProbsKind = manifest.inputs.probs_kind
        self._verified: set[int] = set()
        self._open_shard = lru_cache(_OPEN_SHARDS)(self._map_shard)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the store in the folder ``path``.

        Raises:
            ValueError: There is no complete store, or it is of another schema version.
            DamagedFileError: The manifest cannot be read, or a shard is missing or cut off.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for shard in manifest.shards:
            file = path / shard.file
            if not file.is_file():
                raise DamagedFileError(file, "the manifest lists it, but it is not there")
            if (num_bytes := file.stat().st_size) != shard.num_bytes:
                raise DamagedFileError(file, f"it has {num_bytes} bytes, not {shard.num_bytes}")
        return cls(path=path, manifest=manifest)

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.manifest.requests)

    def __getitem__(self, index: int) -> Trace:
        """The index-th request's trace, in arrays of its own.

        Raises:
            DamagedFileError: The shard that holds it is not what the manifest promised.
        """
        entry = self.manifest.requests[index]
        row = self._open_shard(entry.shard).read_row_group(entry.row)
        return Trace(**{name: value_of(row.column(name)) for name in row.column_names})

    def __iter__(self) -> Iterator[Trace]:
        """The traces in order."""
        return (self[index] for index in range(len(self)))

    def _map_shard(self, index: int) -> pq.ParquetFile:
        shard = self.manifest.shards[index]
        if index not in self._verified:
            verify(self.path, shard)
            self._verified.add(index)
        return pq.ParquetFile(self.path / shard.file, memory_map=True)


class TraceStoreWriter:
    """Writes a store shard by shard; use it as a context manager.

    `write_shard` adds one shard, in any order; `done_request_ids` are those that need not be
    collected again; `finish` writes the manifest once all requests are there. A killed writer
    leaves whole shards only; another one with the same inputs goes on with the others. Deleting a
    damaged shard and writing again repairs a complete store in the same way.

    Args:
        path: The folder; made if absent, and locked against a second writer.
        inputs: What the store is made from.
        split: The split of each request, in the order that the store shall have.

    Raises:
        OutputExistsError: The folder holds something else, or a store made from other inputs (the
            message says what differs), or another process is writing to it.
        DamagedFileError: A shard that is there cannot be read.
    """

    def __init__(self, path: Path, inputs: StoreInputs, split: Mapping[str, Split]) -> None:
        self._path = path
        self._inputs = inputs
        self._schema = features_of(inputs.spec).arrow_schema
        self._split = dict(split)
        self._requests_digest = digest_json(list(self._split.items()))
        self._footers: dict[int, Footer] = {}
        self._is_complete = False
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        try:
            self._take_over()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unlock the folder; what was written stays."""
        os.close(self._lock)

    @property
    def done_request_ids(self) -> frozenset[str]:
        """The requests whose shards are written."""
        return frozenset(name for footer in self._footers.values() for name in footer.request_ids)

    def write_shard(self, index: int, traces: Sequence[Trace]) -> None:
        """Write one shard, atomically.

        Args:
            index: Its number; the same requests must get the same number in every run.
            traces: Its requests.

        Raises:
            ValueError: A trace is of another shape or dtype than the store, or is not one of the
                store's requests, or is there already.
        """
        done = set(self.done_request_ids)
        for trace in traces:
            if trace.request_id not in self._split or trace.request_id in done:
                raise ValueError(f"request {trace.request_id!r}: unknown to the store, or written")
            check(trace, self._inputs.spec)
            done.add(trace.request_id)
        footer = Footer(
            schema_version=SCHEMA_VERSION,
            inputs=self._inputs,
            requests_digest=self._requests_digest,
            request_ids=tuple(trace.request_id for trace in traces),
            trace_digests=tuple(trace_digest(trace) for trace in traces),
            num_tokens=sum(trace.num_tokens for trace in traces),
        )
        write_shard_file(self._path / shard_name(index), footer, traces, schema=self._schema)
        self._footers[index] = footer

    def finish(self) -> None:
        """Write the manifest, unless the store was complete before.

        Raises:
            ValueError: Some requests are missing.
        """
        if self._is_complete:
            return
        indices = sorted(self._footers)
        place = {
            name: (number, row, self._footers[index].trace_digests[row])
            for number, index in enumerate(indices)
            for row, name in enumerate(self._footers[index].request_ids)
        }
        if missing := [name for name in self._split if name not in place]:
            raise ValueError(f"{self._path}: {len(missing)} requests are missing: {missing[:3]}...")
        manifest = manifest_of(
            self._inputs,
            requests=[
                (RequestEntry(request_id=name, split=split, shard=shard, row=row), digest)
                for name, split in self._split.items()
                for shard, row, digest in [place[name]]
            ],
            shards=[shard_entry(self._path / shard_name(index)) for index in indices],
            num_tokens=sum(footer.num_tokens for footer in self._footers.values()),
        )
        write_json(self._path / MANIFEST, manifest.model_dump(mode="json"))

    def _take_over(self) -> None:
        """Learn what an earlier writer left, and refuse what is not ours."""
        for entry in sorted(self._path.iterdir()):
            if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                entry.unlink()  # cut off while it was written; nobody else holds the lock
            elif entry.name.startswith("shard-") and entry.suffix == ".parquet":
                footer = read_footer(entry)
                self._compare(footer.inputs, footer.requests_digest)
                self._footers[int(entry.stem.removeprefix("shard-"))] = footer
            elif entry.name == MANIFEST:
                manifest = read_manifest(self._path)
                requests = [[request.request_id, request.split] for request in manifest.requests]
                self._compare(manifest.inputs, digest_json(requests))
                for shard in manifest.shards:
                    if (self._path / shard.file).is_file():
                        verify(self._path, shard)
            else:
                raise OutputExistsError(
                    self._path, f"it holds {entry.name!r}, which is no part of a trace store"
                )
        complete = len(self.done_request_ids) == len(self._split)
        self._is_complete = complete and (self._path / MANIFEST).exists()

    def _compare(self, inputs: StoreInputs, requests_digest: str) -> None:
        there, here = _flat(inputs.model_dump()), _flat(self._inputs.model_dump())
        requests = "digest of the requests and their split"
        there[requests], here[requests] = requests_digest, self._requests_digest
        different = [
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if different:
            raise OutputExistsError(
                self._path,
                f"a trace store made from other inputs: {'; '.join(different)}. "
                "Name another folder, or delete this one",
            )


def lock_folder(path: Path) -> int:
    """Lock a folder against a second writer, until the descriptor that this returns is closed."""
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputExistsError(path, "another process is writing to it") from None
    return lock


def shard_name(index: int) -> str:
    """The file of the index-th shard."""
    return f"shard-{index:05d}.parquet"


def shard_entry(file: Path) -> ShardEntry:
    """What the manifest says of a shard that is written."""
    return ShardEntry(file=file.name, sha256=sha256_file(file), num_bytes=file.stat().st_size)


def write_shard_file(
    file: Path, footer: Footer, traces: Sequence[Trace], *, schema: pa.Schema
) -> None:
    """Write one shard, atomically."""
    # Neither dictionaries nor statistics: measured on router probabilities they triple the
    # time of writing and of reading, and save nothing.
    with (
        atomic_path(file) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        for trace in traces:
            columns = [one_row(getattr(trace, field.name), field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        writer.add_key_value_metadata({FOOTER_KEY: footer.model_dump_json()})


def manifest_of(
    inputs: StoreInputs,
    *,
    requests: Sequence[tuple[RequestEntry, str]],
    shards: Sequence[ShardEntry],
    num_tokens: int,
) -> Manifest:
    """The manifest of a store whose shards are written.

    Args:
        inputs: What it was made from.
        requests: Each request, in the store's order, and the digest of its trace.
        shards: The shards, in the order to which the requests refer.
        num_tokens: Routed tokens of all requests.
    """
    return Manifest(
        schema_version=SCHEMA_VERSION,
        digest=digest_json(
            [
                {**inputs.spec.to_json(), "model_id": ""},
                inputs.probs_kind,
                [[entry.request_id, entry.split, digest] for entry, digest in requests],
            ]
        ),
        num_requests=len(requests),
        num_tokens=num_tokens,
        inputs=inputs,
        requests=tuple(entry for entry, _ in requests),
        shards=tuple(shards),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; sequences as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
