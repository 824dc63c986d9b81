"""What a blend adds to its members, on requests whose subjects no fitting has seen.

    python -m benchmarks.blend                     # about five minutes on one core
    python -m benchmarks.blend max_tokens=500      # a look

gpt-oss-20b traces (folder MOECAST_DATA), split by topic with three seeds; slot recall of the next
token at 4 and 8 experts, expected calibration error, and the share of the LFRU-to-Belady gap that
each predictor's forecasts close at 8, 13 and 16 of 32 slots a layer.

Ends with one JSON line; ``out=benchmarks/results/blend.json`` keeps it.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.embedders import embedded
from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.schema import TraceList
from data.splits import split_by_topic
from predictors.base import Predictor
from predictors.blend import Blend
from predictors.embedders.sentence import SentenceEmbedder
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.semantic import Semantic
from runtime.evaluate import judge

SEEDS = (0, 1, 2)
RESIDENCIES = (0.25, 0.4, 0.5)


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every number."""
    return {
        name: {
            "mean": float(np.mean([row[name] for row in rows])),
            "sd": float(np.std([row[name] for row in rows], ddof=1)),
            "each": [row[name] for row in rows],
        }
        for name in rows[0]
    }


@dataclass
class Args:
    """Compare a blend with its members; max_tokens judges only so many per seed, null all."""

    max_tokens: int | None = 5000
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    torch.set_num_threads(1)
    traces = load_traces("gptoss20b")
    assert isinstance(traces, TraceList)
    embedder = SentenceEmbedder()
    traces = embedded(traces, embedder)
    topics = {trace.request_id: trace.topic for trace in traces.traces}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    fits = []
    for seed in SEEDS:
        judged = replace(traces, split=split_by_topic(topics, seed=seed))
        blend = Blend(
            members={
                "semantic": Semantic(embedder=embedder),
                "previous_token": PreviousToken(),
                "popularity": Popularity(),
            }
        )
        report = blend.fit(judged)
        details = {name: of for name, of in report.details.items() if name != "members"}
        fits.append({"seed": seed, "fit_s": report.fit_s, **details})
        contenders: dict[str, Predictor] = {"blend": blend, **blend.members}
        outcome = judge(
            contenders,
            judged,
            residencies=RESIDENCIES,
            lookaheads=(1, 4),
            max_tokens=args.max_tokens,
        )
        for name in contenders:
            recall = outcome["predictors"][name]
            numbers = {
                "recall@4": recall["recall"],
                "recall@8": recall["recall_by_fetched"][8],
                "recall@4, 4 tokens ahead": recall["recall_by_lookahead"][4],
                "calibration error": recall["reliability"]["expected_calibration_error"],
            }
            for row in outcome["replay"]:
                if row["predictor"] == name:
                    numbers[f"gap closed, {row['slots']} slots"] = row["gap_closed"]
            found[name].append(numbers)

    results = {name: summary(rows) for name, rows in found.items()}
    print(f"test subjects never fitted: mean (sd) over {len(SEEDS)} seeds")
    for name, numbers in results.items():
        cells = [f"{key} {n['mean']:.3f} ({n['sd']:.3f})" for key, n in numbers.items()]
        print(f"{name:15} " + "   ".join(cells))
    record(
        "blend",
        {
            "traces": traces.spec.describe(),
            "traces_digest": traces.digest,
            "num_requests": len(traces),
            "seeds": SEEDS,
            "max_tokens": args.max_tokens,
            "fits": fits,
            "results": results,
        },
        out=args.out,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
