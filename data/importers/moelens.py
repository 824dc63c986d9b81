"""MoELens jsonl: one prompt a line, with the router's whole softmax of every layer.

    {"model", "prompt", "domain", "num_experts", "top_k", "tokens": [T strings],
     "layers": [{"layer", "experts" [T, K], "weights" [T, K], "all_probs" [T, E]}, ...]}

One file may hold several models; a trace set has one.
"""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import MalformedInputError
from data.files import sha256_file
from data.importers.common import Peek, compact_ids, open_text, spec_of
from data.schema import Trace, TraceList
from data.splits import split_by_topic

logger = logging.getLogger(__name__)


def recognises(content: Peek) -> bool:
    """Whether a file is of this format."""
    try:
        values = json.loads(content.first_line)
    except ValueError:
        return False
    return isinstance(values, dict) and {"model", "tokens", "layers"} <= set(values)


def read_moelens(path: Path, *, model: str | None = None) -> TraceList:
    """Read the prompts of one model; all of their tokens are prompt tokens.

    ``token_ids_P`` number the distinct token strings of the file in order of appearance.
    ``router_probs_TLE`` is set where every layer of the line has ``all_probs``.

    Args:
        path: The file.
        model: Whose prompts; by default those of the model with the most, and the log names the
            others.

    Raises:
        MalformedInputError: A line is not JSON, or its arrays do not fit each other.
        ValueError: The file has no prompts of ``model``.
    """
    with open_text(path) as file:
        lines = [(number, _parse(path, number, text)) for number, text in enumerate(file, start=1)]
    models = Counter(str(line.get("model")) for _, line in lines)
    if model is None and len(models) > 1:
        logger.warning("%s holds several models, %s: taking the first", path.name, dict(models))
    chosen = model or models.most_common(1)[0][0]
    if chosen not in models:
        raise ValueError(f"model={chosen!r}: {path} has {sorted(models)}")

    vocab: dict[str, int] = {}
    traces = []
    for number, line in lines:
        if line.get("model") == chosen:
            try:
                traces.append(_read_trace(path, number, line, vocab))
            except (KeyError, TypeError, ValueError) as error:
                raise MalformedInputError(
                    path, number, f"{type(error).__name__}: {error}"
                ) from None
    first = next(line for _, line in lines if line["model"] == chosen)
    spec = spec_of(
        chosen,
        num_layers=len(first["layers"]),
        num_experts=int(first["num_experts"]),
        top_k=int(first["top_k"]),
        decoder_layers=tuple(int(layer["layer"]) for layer in first["layers"]),
    )
    shapes = {trace.topk_expert_ids_TLK.shape[1:] for trace in traces}
    if shapes != {(spec.num_layers, spec.top_k)}:
        raise ValueError(f"{path}: lines of {chosen} disagree in layers or top_k: {sorted(shapes)}")
    return TraceList(
        spec=spec,
        traces=traces,
        split=split_by_topic({trace.request_id: trace.topic for trace in traces}),
        digest=sha256_file(path),
        probs_kind="softmax",
        path=path,
    )


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise MalformedInputError(path, number, str(error)) from None
    if not isinstance(values, dict):
        raise MalformedInputError(path, number, "not a JSON object")
    return values


def _read_trace(path: Path, number: int, line: dict[str, Any], vocab: dict[str, int]) -> Trace:
    layers = line["layers"]
    ids_TLK = np.stack([np.asarray(layer["experts"]) for layer in layers], axis=1)
    probs_TLK = np.stack([np.asarray(layer["weights"], np.float16) for layer in layers], axis=1)
    tokens = line["tokens"]
    if not len(tokens) == len(ids_TLK) == len(probs_TLK):
        raise ValueError(f"{len(tokens)} tokens, but routing of {len(ids_TLK)}")
    router_probs_TLE = None
    if all("all_probs" in layer for layer in layers):
        router_probs_TLE = np.stack(
            [np.asarray(layer["all_probs"], np.float16) for layer in layers], axis=1
        )
        if router_probs_TLE.shape != (*ids_TLK.shape[:2], line["num_experts"]):
            raise ValueError(f"all_probs {router_probs_TLE.shape} for experts {ids_TLK.shape}")
    return Trace(
        request_id=f"{path.name.split('.')[0]}-{number}",
        source=path.name.split(".")[0],
        topic=str(line.get("domain", "")),
        topk_expert_ids_TLK=compact_ids(ids_TLK, int(line["num_experts"]), path),
        num_prompt_tokens=len(tokens),
        first_routed_position=0,
        topk_probs_TLK=probs_TLK,
        router_probs_TLE=router_probs_TLE,
        token_ids_P=np.array([vocab.setdefault(t, len(vocab)) for t in tokens], np.int32),
        prompt=str(line["prompt"]),
    )
