"""BigMoeOnEdge's route trace: a csv with a row per (token, layer, slot), and what was resident.

    # route_trace v1
    # model=... arch=... n_layer=... n_expert=128 n_expert_used=6
    # layer=0 expert_bytes=3059712 ...          (one line a layer; sizes differ between layers)
    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes

``phase`` is 0 for prompt tokens and 1 for decode steps; ``step`` counts tokens within a turn. The
recording engine cached experts under one global LRU, so ``residency`` is ground truth for a
simulator. Read with numpy alone: replaying a trace needs no table library.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DamagedFileError, MalformedInputError
from data.files import sha256_file
from data.importers.common import Peek, compact_ids, open_text
from data.schema import MoESpec, Trace, TraceList
from data.splits import split_by_topic

logger = logging.getLogger(__name__)

_MAGIC = "# route_trace v1"
_MODEL = re.compile(r"# model=(?P<model>.*?) arch=.* n_expert=(?P<E>\d+) n_expert_used=(?P<K>\d+)")
_LAYER = re.compile(r"# layer=(?P<layer>\d+) expert_bytes=(?P<bytes>\d+)")
_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRoute:
    """A route trace and what its engine found resident, one entry a trace (that is, a turn).

    Args:
        traces: The routing.
        resident_TLK: bool, whether the expert was in the engine's cache when it was asked for.
            False throughout the prompt: there the engine records no residency.
        recorded_TL: bool, False where the file has no row and the trace holds a repetition.
    """

    traces: TraceList
    resident_TLK: tuple[npt.NDArray[np.bool_], ...]
    recorded_TL: tuple[npt.NDArray[np.bool_], ...]


def recognises(content: Peek) -> bool:
    """Whether a file is of this format."""
    return content.first_line.startswith("# route_trace")


def read_bigmoe_route(path: Path) -> RecordedRoute:
    """Read a ``.route.csv`` or ``.route.csv.gz``; one trace a turn.

    Slots keep their order, so ids stand in the router's order; weights sum to 1 over the K.
    llama.cpp computes the last layer only for the last token of a prompt; rows that it skipped are
    filled with those that it recorded there, so that a prompt's distinct experts in each layer stay
    what they were. `RecordedRoute.recorded_TL` tells them apart.

    Raises:
        MalformedInputError: A line is not a row of numbers.
        DamagedFileError: The header is not version 1, or rows are missing, repeated or impossible.
    """
    with open_text(path) as file:
        lines = file.read().splitlines()
    first_row = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    spec, columns = _read_header(path, lines[: first_row + 1])
    table = _read_rows(path, lines, first_row + 1, num_columns=len(columns))
    column = {name: table[:, i] for i, name in enumerate(columns)}
    column |= {name: column[name].astype(np.int64) for name in _COLUMNS if name != "weight"}

    traces, resident, recorded = [], [], []
    stem = path.name.split(".")[0]
    for turn in np.unique(column["turn"]):
        rows = column["turn"] == turn
        trace, resident_TLK, recorded_TL = _read_turn(
            path, spec, {name: values[rows] for name, values in column.items()}, f"{stem}-{turn}"
        )
        traces.append(trace)
        resident.append(resident_TLK)
        recorded.append(recorded_TL)
    if missing := sum(int((~recorded_TL).sum()) for recorded_TL in recorded):
        logger.warning(
            "%s: %d (prompt token, layer) pairs were not computed; they repeat the last token's",
            path.name,
            missing,
        )
    return RecordedRoute(
        traces=TraceList(
            spec=spec,
            traces=traces,
            split=split_by_topic({trace.request_id: trace.topic for trace in traces}),
            digest=sha256_file(path),
            probs_kind="topk_softmax",
            path=path,
        ),
        resident_TLK=tuple(resident),
        recorded_TL=tuple(recorded),
    )


def _read_header(path: Path, lines: list[str]) -> tuple[MoESpec, list[str]]:
    """The spec from the comment lines, and the column names."""
    if not lines or lines[0].strip() != _MAGIC:
        raise DamagedFileError(path, f"its first line is not {_MAGIC!r}")
    model = next((match for line in lines if (match := _MODEL.match(line))), None)
    layers = [match for line in lines if (match := _LAYER.match(line))]
    columns = lines[-1].strip().split(",")
    if model is None or not layers or not set(_COLUMNS) <= set(columns):
        raise DamagedFileError(path, "its header lacks the model, the layers or a column")
    spec = MoESpec(
        model_id=PurePosixPath(model["model"]).name,
        num_experts=int(model["E"]),
        top_k=int(model["K"]),
        decoder_layers=tuple(int(match["layer"]) for match in layers),
        expert_bytes_per_layer=tuple(int(match["bytes"]) for match in layers),
    )
    return spec, columns


def _read_rows(
    path: Path, lines: list[str], start: int, *, num_columns: int
) -> npt.NDArray[np.float64]:
    try:
        table = np.loadtxt(lines[start:], delimiter=",", ndmin=2)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape[1] == num_columns and len(table):
        return table
    for number, line in enumerate(lines[start:], start=start + 1):  # the slow way, to say where
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError as error:
            raise MalformedInputError(path, number, str(error)) from None
        if len(values) != num_columns:
            raise MalformedInputError(path, number, f"{len(values)} values for {num_columns} names")
    raise DamagedFileError(path, "it has no rows")


def _read_turn(
    path: Path, spec: MoESpec, column: dict[str, npt.NDArray[Any]], request_id: str
) -> tuple[Trace, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    steps, t = np.unique(column["step"], return_inverse=True)
    num_prompt_tokens = len(np.unique(column["step"][column["phase"] == 0]))
    if (column["phase"] != (t >= num_prompt_tokens)).any():
        raise DamagedFileError(path, f"turn {request_id}: prompt and decode steps are mixed")
    layer = np.searchsorted(spec.decoder_layers, column["layer"])
    slot = column["slot"]
    if not (
        set(np.unique(column["layer"])) <= set(spec.decoder_layers)
        and 0 <= slot.min() <= slot.max() < spec.top_k
    ):
        raise DamagedFileError(path, f"turn {request_id}: a layer or slot is not in the header")

    shape_TLK = (len(steps), spec.num_layers, spec.top_k)
    ids_TLK = np.full(shape_TLK, -1, np.int64)
    probs_TLK = np.zeros(shape_TLK, np.float16)
    resident_TLK = np.zeros(shape_TLK, np.bool_)
    ids_TLK[t, layer, slot] = column["expert"]
    probs_TLK[t, layer, slot] = column["weight"]
    resident_TLK[t, layer, slot] = column["residency"] > 0
    recorded_TL: npt.NDArray[np.bool_] = np.all(ids_TLK >= 0, axis=-1)
    if int(recorded_TL.sum()) * spec.top_k != len(t):
        raise DamagedFileError(path, f"turn {request_id}: a slot is missing or given twice")
    skipped_t, skipped_layer = np.nonzero(~recorded_TL)
    last_t = num_prompt_tokens - 1
    if (skipped_t >= num_prompt_tokens).any() or not recorded_TL[last_t, skipped_layer].all():
        raise DamagedFileError(path, f"turn {request_id}: rows of a token are missing")
    ids_TLK[skipped_t, skipped_layer] = ids_TLK[last_t, skipped_layer]
    probs_TLK[skipped_t, skipped_layer] = probs_TLK[last_t, skipped_layer]
    trace = Trace(
        request_id=request_id,
        source=request_id.rpartition("-")[0],
        topic="",
        topk_expert_ids_TLK=compact_ids(ids_TLK, spec.num_experts, path),
        num_prompt_tokens=num_prompt_tokens,
        first_routed_position=0,
        topk_probs_TLK=probs_TLK,
    )
    return trace, resident_TLK, recorded_TL
