"""A trace store that grows: requests are added as they happen, and it is complete at every moment.

`data.store.TraceStoreWriter` knows all of its requests from the start; `TraceStoreAppender` knows
none. Each `append` writes a shard and then the manifest anew, both atomically: a reader sees the
store before or after, and a writer that dies leaves at most a shard that no manifest names, which
the next one removes. What is read is a `data.store.TraceStore` like any other.

A request's split is drawn from its name alone (`data.splits.split_of`), so it never changes.

Knows nothing of models, servers or who sent the requests.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from data.errors import OutputExistsError
from data.files import digest_json, write_json
from data.schema import Trace
from data.splits import split_of
from data.store import (
    MANIFEST,
    StoreInputs,
    lock_folder,
    manifest_of,
    shard_entry,
    shard_name,
    write_shard_file,
)
from data.store_manifest import (
    SCHEMA_VERSION,
    Footer,
    RequestEntry,
    ShardEntry,
    read_footer,
    read_manifest,
)
from data.store_rows import check, features_of, trace_digest


class TraceStoreAppender:
    """Adds to the store in a folder, or begins it; use it as a context manager.

    Args:
        path: The folder; made if absent, and locked against a second writer.
        inputs: What the traces come from; the same as those of the store that is there.

    Raises:
        OutputExistsError: The folder holds something else, or a store of other inputs, or another
            process is writing to it.
        DamagedFileError: What is there cannot be read.
    """

    def __init__(self, path: Path, inputs: StoreInputs) -> None:
        self._path = path
        self._inputs = inputs
        self._schema = features_of(inputs.spec).arrow_schema
        self._requests: list[tuple[RequestEntry, str]] = []
        self._shards: list[ShardEntry] = []
        self._num_tokens = 0
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        try:
            self._take_over()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        """Return the appender itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unlock the folder; what was written stays."""
        self.close()

    def close(self) -> None:
        """Unlock the folder; nothing may be appended afterwards."""
        os.close(self._lock)

    def __len__(self) -> int:
        """Requests of the store."""
        return len(self._requests)

    def append(self, traces: Sequence[Trace]) -> None:
        """Add a shard; after an error the store is what it was, or what it was to be.

        Args:
            traces: At least one, whose request ids are new.

        Raises:
            ValueError: A trace is of another shape or dtype than the store.
            OSError: It cannot be written.
        """
        number = len(self._shards)
        for trace in traces:
            check(trace, self._inputs.spec)
        digests = [trace_digest(trace) for trace in traces]
        entries = [
            (
                RequestEntry(
                    request_id=trace.request_id,
                    split=split_of(trace.request_id),
                    shard=number,
                    row=row,
                ),
                digests[row],
            )
            for row, trace in enumerate(traces)
        ]
        num_tokens = sum(trace.num_tokens for trace in traces)
        footer = Footer(
            schema_version=SCHEMA_VERSION,
            inputs=self._inputs,
            requests_digest=digest_json([[e.request_id, e.split] for e, _ in entries]),
            request_ids=tuple(trace.request_id for trace in traces),
            trace_digests=tuple(digests),
            num_tokens=num_tokens,
        )
        file = self._path / shard_name(number)
        try:
            write_shard_file(file, footer, traces, schema=self._schema)
            requests = [*self._requests, *entries]
            shards = [*self._shards, shard_entry(file)]
            total = self._num_tokens + num_tokens
            manifest = manifest_of(self._inputs, requests=requests, shards=shards, num_tokens=total)
            write_json(self._path / MANIFEST, manifest.model_dump(mode="json"))
        except BaseException:
            # What came after the manifest's rename has failed if it names the shard.
            named = read_manifest(self._path).shards if (self._path / MANIFEST).exists() else ()
            if all(shard.file != file.name for shard in named):
                file.unlink(missing_ok=True)
                raise
            self._requests, self._shards, self._num_tokens = requests, shards, total
            raise
        self._requests, self._shards, self._num_tokens = requests, shards, total

    def _take_over(self) -> None:
        """Learn what is there, remove what no manifest names, and refuse what is not ours."""
        files = sorted(entry for entry in self._path.iterdir())
        ours = [f for f in files if f.name.startswith("shard-") and f.suffix == ".parquet"]
        cut_off = [f for f in files if f.name.startswith(".") and f.name.endswith(".tmp")]
        if others := {f.name for f in {*files} - {*ours, *cut_off}} - {MANIFEST}:
            raise OutputExistsError(
                self._path, f"it holds {sorted(others)[0]!r}, which is no part of a trace store"
            )
        if (self._path / MANIFEST).exists():
            manifest = read_manifest(self._path)
            if manifest.inputs != self._inputs:
                raise OutputExistsError(
                    self._path,
                    "a trace store of another model, or made in another way: name another folder",
                )
            self._shards = list(manifest.shards)
            self._num_tokens = manifest.num_tokens
            digests = [read_footer(self._path / s.file).trace_digests for s in manifest.shards]
            self._requests = [
                (entry, digests[entry.shard][entry.row]) for entry in manifest.requests
            ]
        named = {shard.file for shard in self._shards}
        unnamed = [file for file in ours if file.name not in named]
        for file in unnamed:
            if read_footer(file).inputs != self._inputs:
                raise OutputExistsError(self._path, f"{file.name} is a shard of another store")
        for file in [*unnamed, *cut_off]:
            file.unlink()
