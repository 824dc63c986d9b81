"""Real routing traces of other engines, read into our vocabulary.

One file a format, each with ``recognises(peek)`` and ``read_x(path) -> TraceList``; `load_traces`
is the one entry, and takes our own trace stores too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.files import digest_json
from data.importers import bigmoe_route, moelens, per_token_npz, vllm
from data.importers.catalog import TRACES, trace_files
from data.importers.common import Peek, peek
from data.schema import TraceList, TraceSet

FORMATS: Mapping[str, tuple[Callable[[Peek], bool], Callable[[Path], TraceList]]] = {
    "per-token npz": (per_token_npz.recognises, per_token_npz.read_per_token_npz),
    "vLLM routed_experts npz or npy": (vllm.recognises, vllm.read_vllm),
    "BigMoeOnEdge route csv": (
        bigmoe_route.recognises,
        lambda path: bigmoe_route.read_bigmoe_route(path).traces,
    ),
    "MoELens jsonl": (moelens.recognises, moelens.read_moelens),
}


def load_traces(where: str | Path) -> TraceSet:
    """Open any traces by name or path.

    Args:
        where: A name of `catalog.TRACES`, which lie in the folder MOECAST_DATA; or a path: the
            folder of a trace store, or a file of one of `FORMATS`, told by its content. A path that
            is spelt like a name needs a ``./``.

    Raises:
        ValueError: There is no such name or path, or the file is of no format that we know.
        DamagedFileError, MalformedInputError: The file cannot be read.
    """
    if where in TRACES:
        return _concatenate([_read_file(file) for file in trace_files(str(where))])
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
    return _read_file(path)


def _read_file(path: Path) -> TraceList:
    content = peek(path)
    for recognises, read in FORMATS.values():
        if recognises(content):
            return read(path)
    raise ValueError(
        f"trace {path}: not of a format that we read; those are {list(FORMATS)}, "
        "and the folder of a trace store"
    )


def _concatenate(parts: Sequence[TraceList]) -> TraceList:
    """Several files of one model as one set; each keeps the split that it has alone."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if (mismatch := first.spec.mismatch(part.spec)) or part.probs_kind != first.probs_kind:
            raise ValueError(f"{first.path} and {part.path} do not go together: {mismatch}")
    return TraceList(
        spec=first.spec,
        traces=[trace for part in parts for trace in part.traces],
        split={name: split for part in parts for name, split in part.split.items()},
        digest=digest_json([part.digest for part in parts]),
        probs_kind=first.probs_kind,
    )
