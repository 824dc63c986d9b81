"""Judge predictors on recorded traces: how well they foresee, and what a cache gains by it.

Joins the two halves that may not know each other: recall from `predictors.metrics`, hit ratios and
the gap closed from `runtime.simulate`. Only requests of the split "test" are looked at.

Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data.schema import TraceList, TraceSet
from predictors.base import Predictor
from predictors.metrics import evaluate_recall
from predictors.routing import mean_use_LE, traces_of
from runtime.budget import slots_at
from runtime.simulate import Result, simulate

logger = logging.getLogger(__name__)

BOUNDS = ("lru", "lfru", "belady")


def judge(
    predictors: Mapping[str, Predictor],
    traces: TraceSet,
    *,
    residencies: Sequence[float],
    lookaheads: Sequence[int],
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Measure every predictor beside the policies that need none.

    Args:
        predictors: Fitted ones by name.
        traces: Where the test requests are taken from.
        residencies: Shares of the experts that the cache holds, per layer.
        lookaheads: Tokens ahead for recall; must hold 1.
        max_tokens: Stop after so many tokens, or None for all.

    Returns:
        Plain values: `predictors` (name -> `RecallReport.to_json`), `replay` (one row per policy,
        predictor and residency), `mean_use_LE`, `top_k`, `lookaheads`, `residencies`.
    """
    spec = traces.spec
    recall = {}
    for name, predictor in predictors.items():
        report = evaluate_recall(
            predictor, traces, max_tokens=max_tokens, lookaheads=tuple(lookaheads)
        )
        logger.info("%s: slot recall@%d %.3f", name, spec.top_k, report.recall)
        recall[name] = report.to_json()
    slots = {slots_at(residency, spec): residency for residency in residencies}
    test = TraceList(
        spec=spec,
        traces=list(traces_of(traces, "test")),
        split=traces.split,
        digest=traces.digest,
        probs_kind=traces.probs_kind,
    )
    replay = _rows(simulate(test, policies=BOUNDS, slots=list(slots), max_tokens=max_tokens), None)
    for name, predictor in predictors.items():
        results = simulate(
            test,
            policies=["forecast"],
            slots=list(slots),
            predictor=predictor,
            with_truth=predictor.needs_truth,
            max_tokens=max_tokens,
        )
        replay += _rows(results, name)
    for row in replay:
        row["residency"] = slots[row["slots"]]
    return {
        "predictors": recall,
        "replay": replay,
        "mean_use_LE": mean_use_LE(traces, "test")[0].tolist(),
        "top_k": spec.top_k,
        "lookaheads": list(lookaheads),
        "residencies": list(residencies),
    }


def _rows(results: Sequence[Result], predictor: str | None) -> list[dict[str, Any]]:
    return [{**asdict(result), "predictor": predictor} for result in results]
