"""One artifact on one trace set: which of its requests may be judged, and all that is measured.

The command is ``python -m predictors.evaluate``; this is what it joins. Traces are known again by
their digest, and single requests by their routing, whatever file they stand in.
"""

import dataclasses
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from data.errors import SpecMismatchError
from data.importers import load_traces
from data.schema import TraceList, TraceSet
from predictors.artifact import Manifest, artifact_digest, load_artifact, read_manifest
from predictors.prefetch_budget import experts_per_layer_of, sized_spec
from predictors.registry import predictor_class
from predictors.routing import request_digest
from runtime.evaluate import (
    Judged,
    JudgeSettings,
    judge_policies,
    judge_predictor,
    judged_requests,
)

logger = logging.getLogger(__name__)


def judge_artifact(
    artifact: Path,
    trace: str | Path,
    *,
    split: str = "auto",
    prefetch_experts: int | None = None,
    prefetch_bytes: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure an exported predictor on recorded traces.

    Args:
        artifact: Its folder.
        trace: A name or path, as of `load_traces`.
        split: "test", "val", "fit", "all"; or "auto": "test" where the traces are those that the
            artifact was fitted on, else every request that it was not fitted on.
        prefetch_experts: Prefetch budget in experts per layer and token; None = K.
        prefetch_bytes: The same in bytes a token, instead.
        settings: Of `JudgeSettings`.

    Returns:
        Plain values, free of NaN; `recall_at_k`, `recall_curve`, `per_layer`, `gap_closed`,
        `reliability`, `us_per_token` and what stands beside them.

    Raises:
        FileNotFoundError, DamagedFileError: The artifact cannot be read.
        SpecMismatchError: The traces are of another model.
        ValueError: An argument is out of range, there is nothing to judge, or the predictor has
            nothing to say of recorded traces.
    """
    asked = JudgeSettings(**settings)
    manifest = read_manifest(artifact)
    if predictor_class(manifest.kind).needs_model:
        raise ValueError(
            f"artifact {artifact}: {manifest.kind!r} reads router inputs of a live model, which "
            f"recorded traces do not hold: judge it as train.py predictor={manifest.kind} does, or "
            "with python -m benchmarks.layer_recall"
        )
    spec = manifest.spec.spec()
    traces = load_traces(trace, num_experts=spec.num_experts)
    if difference := spec.mismatch(traces.spec):
        raise SpecMismatchError(
            f"artifact {artifact} is of another model than trace {trace}: {difference}"
        )
    predictor = load_artifact(artifact, expect=traces.spec)
    n = experts_per_layer_of(
        sized_spec(traces.spec, spec), experts=prefetch_experts, bytes_per_token=prefetch_bytes
    )
    requests, which, why = _choose(manifest, traces, split)
    logger.info("judging %s", why)
    without = judge_policies(requests, asked)
    found = judge_predictor(predictor, requests, asked, without=without)
    report, cost = found["report"], found["cost"]
    rows = [*without, *found["replay"]]
    hit_ratio, gaps = _by_residency(rows, "hit_ratio"), _by_residency(rows, "gap_closed")
    prefetch = next(row for row in report["prefetch"] if row["experts_per_layer"] == n)
    return {
        "kind": manifest.kind,
        "model": traces.spec.describe(),
        "moments": sorted(predictor.moments),
        "top_k": traces.spec.top_k,
        "judged": {
            "split": which,
            "why": why,
            "num_requests": report["num_requests"],
            "trace_requests": len(traces),
        },
        "num_tokens": report["num_tokens"],
        "num_tokens_without_forecast": report["num_tokens_without_forecast"],
        "recall_at_k": report["recall"],
        "recall_curve": {str(k): recall for k, recall in report["recall_by_fetched"].items()},
        "per_layer": report["recall_by_layer"],
        "recall_by_lookahead": {str(h): r for h, r in report["recall_by_lookahead"].items()},
        "gap_closed": {residency: row.get("forecast") for residency, row in gaps.items()},
        "gap_closed_by_policy": gaps,
        "hit_ratio": hit_ratio,
        "slots": {f"{row['residency']:g}": row["slots"] for row in rows},
        "prefill": rows[0]["prefill"],
        "reliability": report["reliability"],
        "prefetch": prefetch,
        "prefetch_curve": report["prefetch"],
        "us_per_token": cost["us_per_token"],
        "us_per_token_gpu": cost["us_per_token_gpu"],
        "cost": {**cost, "fit_s": (manifest.fit_report or {}).get("fit_s")},
        "digests": {
            "artifact": artifact_digest(artifact),
            "trace": traces.digest,
            "fitted_on": manifest.parents.get("traces"),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "trace": str(trace),
        "artifact": str(artifact),
    }


def _choose(manifest: Manifest, traces: TraceSet, split: str) -> tuple[TraceList, str, str]:
    """The requests to judge, the split that they are, and why."""
    same = traces.digest == manifest.parents.get("traces")
    if split != "auto":
        known = "of the traces that it was fitted on" if same else "of other traces than its fit"
        requests = judged_requests(traces, cast(Judged, split))
        return requests, split, f"split {split!r}, as asked, {known}"
    if same:
        requests = judged_requests(traces, "test")
        return requests, "test", "the test requests of the traces that it was fitted on"
    everything = judged_requests(traces, "all")
    if not manifest.fitted_requests:
        logger.warning(
            "the artifact does not say which requests it was fitted on: none is left out"
        )
        return everything, "all", "every request: the artifact does not name those of its fit"
    fitted = set(manifest.fitted_requests)
    unseen = [trace for trace in everything.traces if request_digest(trace) not in fitted]
    num_seen = len(everything) - len(unseen)
    if not num_seen:
        return everything, "all", "every request: these are not the traces that it was fitted on"
    if not any(trace.num_tokens for trace in unseen):
        raise ValueError(
            f"nothing to judge: it was fitted on all {num_seen} requests of these traces; "
            "split=all judges them all the same"
        )
    why = f"every request but {num_seen} of {len(everything)} that it was fitted on"
    return dataclasses.replace(everything, traces=unseen), "unseen", why


def _by_residency(
    rows: Sequence[Mapping[str, Any]], value: str
) -> dict[str, dict[str, float | None]]:
    """Residency -> policy -> value."""
    table: dict[str, dict[str, float | None]] = {}
    for row in rows:
        table.setdefault(f"{row['residency']:g}", {})[row["policy"]] = row[value]
    return table
