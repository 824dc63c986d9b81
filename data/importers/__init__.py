"""Real routing traces of other engines, read into our vocabulary.

One file a format, each with ``recognises(peek)`` and ``read_x(path) -> TraceList``; `load_traces`
is the one entry, and takes our own trace stores too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.files import digest_json
from data.importers import bigmoe_route, moelens, per_token_npz, vllm
from data.importers.catalog import TRACES, trace_files
from data.importers.common import Peek, peek
from data.schema import TraceList, TraceSet

# How to tell a format, and how to read it: some do not say E, and take it as `num_experts`.
FORMATS: Mapping[str, tuple[Callable[[Peek], bool], Callable[..., TraceList]]] = {
    "per-token npz": (per_token_npz.recognises, per_token_npz.read_per_token_npz),
    "vLLM routed_experts npz or npy": (vllm.recognises, vllm.read_vllm),
    "BigMoeOnEdge route csv": (
        bigmoe_route.recognises,
        lambda path, **_: bigmoe_route.read_bigmoe_route(path).traces,
    ),
    "MoELens jsonl": (moelens.recognises, lambda path, **_: moelens.read_moelens(path)),
}


def load_traces(where: str | Path, *, num_experts: int | None = None) -> TraceSet:
    """Open any traces by name or path.

    Args:
        where: A name of `catalog.TRACES`, which lie in the folder MOECAST_DATA; or a path: the
            folder of a trace store, or a file of one of `FORMATS`, told by its content. A path that
            is spelt like a name needs a ``./``.
        num_experts: E, for files that do not say it: else those take the highest id + 1.

    Raises:
        ValueError: There is no such name or path, or the file is of no format that we know.
        DamagedFileError, MalformedInputError: The file cannot be read.
    """
    if where in TRACES:
        name = str(where)
        return _concatenate(name, [_read_file(file, num_experts) for file in trace_files(name)])
    path = Path(where)
    if path.is_dir():
        if not (path / "manifest.json").exists():
            raise ValueError(f"trace {path}: a folder without manifest.json is no trace store")
        # Stores need the datasets package, which a machine that only simulates or serves lacks.
        from data.store import TraceStore

        return TraceStore.open(path)
    if not path.exists():
        raise ValueError(
            f"trace {str(where)!r}: no such file or folder, and no name; names are {list(TRACES)}"
        )
    return _read_file(path, num_experts)


def _read_file(path: Path, num_experts: int | None) -> TraceList:
    content = peek(path)
    for recognises, read in FORMATS.values():
        if recognises(content):
            return read(path, num_experts=num_experts)
    raise ValueError(
        f"trace {path}: not of a format that we read; those are {list(FORMATS)}, "
        "and the folder of a trace store"
    )


def _concatenate(name: str, parts: Sequence[TraceList]) -> TraceList:
    """The files behind one name as one set; each keeps the split that it has alone."""
    first = parts[0]
    for part in parts[1:]:
        if (mismatch := first.spec.mismatch(part.spec)) or part.probs_kind != first.probs_kind:
            raise ValueError(f"{first.path} and {part.path} do not go together: {mismatch}")
    return dataclasses.replace(
        first,
        traces=[dataclasses.replace(trace, source=name) for part in parts for trace in part.traces],
        split={request_id: split for part in parts for request_id, split in part.split.items()},
        digest=first.digest if len(parts) == 1 else digest_json([part.digest for part in parts]),
        path=first.path if len(parts) == 1 else None,
    )
