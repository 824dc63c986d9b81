"""vLLM's ``routed_experts`` arrays, and a file to keep them in.

With ``--enable-return-routed-experts`` vLLM returns integers [tokens, decoder layers, K]:
``RequestOutput.prompt_routed_experts`` has a row for each prompt token and
``CompletionOutput.routed_experts`` one for each generated token but the last, which was never fed
back. The layer axis counts *decoder* layers; dense ones are zero. SGLang's ``routed_experts`` are
alike, prompt and answer in one array.

The file is an npz, never pickled, with arrays

    <request id>/prompt_routed_experts   int16 [P, decoder layers, K], or absent
    <request id>/routed_experts          int16 [G, decoder layers, K]
    metadata                             uint8, UTF-8 JSON, or absent:
        {"schema_version": 1, "spec": MoESpec, "requests": {id: {"source", "topic", "split",
         "num_prompt_tokens", "first_routed_position", "token_ids", "prompt"}}}

`data.exporters.vllm` writes it.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DamagedFileError
from data.files import sha256_file
from data.importers.common import Peek, compact_ids, load_arrays, peek
from data.schema import MoESpec, Trace, TraceList
from data.splits import split_by_topic

logger = logging.getLogger(__name__)

_Ids = npt.NDArray[Any]

SCHEMA_VERSION = 1
METADATA = "metadata"
PROMPT = "prompt_routed_experts"
GENERATED = "routed_experts"


def recognises(content: Peek) -> bool:
    """Whether a file is of this format."""
    names = {name.rpartition("/")[2] for name in content.arrays}
    return content.kind == "npy" or bool(names & {PROMPT, GENERATED})


def read_vllm(path: Path, *, num_experts: int | None = None) -> TraceList:
    """Read the npz above, or a bare ``.npy`` [T, decoder layers, K] of one request.

    Without metadata little is known: layers whose ids are zero throughout are taken for dense ones,
    E for the highest id + 1 (the log says so), and all of a bare ``.npy`` for prompt tokens, as it
    does not say where the answer begins.

    Args:
        path: The file.
        num_experts: E, where the metadata does not say.

    Raises:
        DamagedFileError: An array is unreadable, has impossible ids, or does not fit the others.
    """
    ids_of, metadata = _read_arrays(path)
    shapes = {ids.shape[1:] for pair in ids_of.values() for ids in pair}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise DamagedFileError(path, f"arrays must be [tokens, layers, K] alike, not {shapes}")
    num_decoder_layers = next(iter(shapes))[0]
    try:
        if metadata is None:
            spec = _guess_spec(path, ids_of, num_experts)
        else:
            if metadata["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {metadata['schema_version']} is not known")
            spec = MoESpec.from_json(metadata["spec"])
        rows: Mapping[str, Any] = metadata["requests"] if metadata else dict.fromkeys(ids_of, {})
        layers = _layers(spec, num_decoder_layers)
        traces = [
            _read_trace(path, spec, name, ids_of[name], layers, row) for name, row in rows.items()
        ]
        split = {name: row["split"] for name, row in rows.items() if "split" in row}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(path, f"{type(error).__name__}: {error}") from error
    return TraceList(
        spec=spec,
        traces=traces,
        split=split or split_by_topic({trace.request_id: trace.topic for trace in traces}),
        digest=sha256_file(path),
        path=path,
    )


def _read_arrays(path: Path) -> tuple[dict[str, tuple[_Ids, _Ids]], dict[str, Any] | None]:
    """Prompt and generated ids of each request, and the metadata, if any."""
    stem = path.name.split(".")[0]
    if peek(path).kind == "npy":
        logger.warning("%s: one request, all of it taken for prompt tokens", path.name)
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DamagedFileError(path, str(error)) from error
        return {stem: (ids, ids[:0])}, None
    ids_of: dict[str, dict[str, _Ids]] = {}
    metadata = None
    for key, values in load_arrays(path).items():
        name, _, kind = key.rpartition("/")
        if key == METADATA:
            try:
                metadata = json.loads(values.tobytes())
            except ValueError as error:
                raise DamagedFileError(path, f"metadata: {error}") from error
        elif kind in (PROMPT, GENERATED):
            ids_of.setdefault(name or stem, {})[kind] = values
        else:
            raise DamagedFileError(path, f"array {key!r} is not <request id>/{GENERATED}")
    if metadata is not None and set(ids_of) != set(metadata.get("requests", ())):
        raise DamagedFileError(path, "arrays and metadata name different requests")
    pairs = {}
    for name, kinds in ids_of.items():
        some = next(iter(kinds.values()))
        pairs[name] = (kinds.get(PROMPT, some[:0]), kinds.get(GENERATED, some[:0]))
    return pairs, metadata


def _guess_spec(
    path: Path, ids_of: Mapping[str, tuple[_Ids, _Ids]], num_experts: int | None
) -> MoESpec:
    all_ids = [ids for pair in ids_of.values() for ids in pair if ids.size]
    if not all_ids:
        raise ValueError("no token has routing")
    if num_experts is None:
        num_experts = int(max(ids.max() for ids in all_ids)) + 1
        logger.warning("%s does not say E: taking the highest id + 1, %d", path.name, num_experts)
    # With one expert a token, zeros may be routing: then every layer counts.
    top_k = all_ids[0].shape[-1]
    is_moe_L = np.any([ids.any(axis=(0, 2)) for ids in all_ids], axis=0) | (top_k == 1)
    return MoESpec(
        model_id=path.name.split(".")[0],
        num_experts=num_experts,
        top_k=top_k,
        decoder_layers=tuple(int(layer) for layer in np.flatnonzero(is_moe_L)),
    )


def _layers(spec: MoESpec, num_decoder_layers: int) -> list[int]:
    """Where the MoE layers lie on the arrays' layer axis."""
    if num_decoder_layers > spec.decoder_layers[-1]:
        return list(spec.decoder_layers)
    if num_decoder_layers == spec.num_layers:  # written by an engine that skips dense layers
        return list(range(spec.num_layers))
    raise ValueError(f"{num_decoder_layers} layers do not fit {spec.describe()}")


def _read_trace(
    path: Path,
    spec: MoESpec,
    name: str,
    ids: tuple[_Ids, _Ids],
    layers: list[int],
    row: Mapping[str, Any],
) -> Trace:
    prompt, _ = ids
    token_ids = row.get("token_ids")
    return Trace(
        request_id=name,
        source=row.get("source", "vllm"),
        topic=row.get("topic", ""),
        topk_expert_ids_TLK=compact_ids(np.concatenate(ids)[:, layers], spec.num_experts, path),
        num_prompt_tokens=int(row.get("num_prompt_tokens", len(prompt))),
        first_routed_position=int(row.get("first_routed_position", 0)),
        token_ids_P=None if token_ids is None else np.array(token_ids, np.int32),
        prompt=row.get("prompt"),
    )
