"""Which prompt embedder finds the better neighbours, and what each part of `semantic` is worth.

    python -m benchmarks.embedders                    # a quarter of an hour on two cores
    python -m benchmarks.embedders max_tokens=2000    # a look

Slot recall on the gpt-oss-20b traces (folder MOECAST_DATA): of the 4 experts that a decode token
used in a layer, how many are among the 4 ranked first before it was routed. Two ways to split, with
three seeds each: by topic (the tested subjects were never seen in fitting) and by request (other
requests of the same subjects were). Everything is fitted anew for every split.

gpt-oss-20b's own embedding matrix is not at hand, so `token_mean` reads the embedded tiny model's:
the method is FineMoE's, the vectors are a stand-in's.

Ends with one JSON line; ``out=benchmarks/results/embedders.json`` keeps it.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.schema import Split, TraceList
from data.splits import split_by_topic
from predictors.base import Predictor
from predictors.embedders.base import Embedder
from predictors.embedders.sentence import SentenceEmbedder
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.metrics import RecallReport, evaluate_recall
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.semantic import Semantic

SEEDS = (0, 1, 2)
# Cumulative: from Eq. 4 to the default, one change at a time.
PAPER: dict[str, Any] = {
    "granularity": "request",
    "neighbours": 1,
    "centre": False,
    "adapt_tokens": None,
}
SEARCHES = {
    "top-1 (FineMoE Eq. 4)": PAPER,
    "top-1, centred": PAPER | {"centre": True},
    "top-32": PAPER | {"neighbours": 32},
    "top-32, centred": PAPER | {"neighbours": 32, "centre": True},
}
PARTS = {
    "top-32, centred + adapting": SEARCHES["top-32, centred"] | {"adapt_tokens": 32},
    "top-32, centred + next token": SEARCHES["top-32, centred"] | {"granularity": "token"},
    "default: all of it": {},
}


@dataclass(frozen=True)
class Row:
    """One predictor in one configuration, as a line of the table."""

    predictor: str
    embedder: str = ""
    variant: str = ""


def embedded(traces: TraceList, embedder: Embedder) -> TraceList:
    """The same traces with their prompts embedded once, instead of once per configuration."""
    vectors_NS = embedder.embed([trace.prompt or "" for trace in traces.traces])
    return replace(
        traces,
        traces=[
            replace(trace, prompt_embedding_S=vector_S)
            for trace, vector_S in zip(traces.traces, vectors_NS, strict=True)
        ],
    )


def splits(traces: TraceList) -> Iterator[tuple[str, int, Mapping[str, Split]]]:
    """(way, seed, split of each request)."""
    topics = {trace.request_id: trace.topic for trace in traces.traces}
    ids = {name: name for name in topics}
    for seed in SEEDS:
        yield "topic", seed, split_by_topic(topics, seed=seed)
        # Every request its own topic: requests are assigned, whatever they are about.
        yield "request", seed, split_by_topic(ids, seed=seed)


def configurations(
    embedders: Mapping[str, Embedder],
) -> Iterator[tuple[Row, str, Predictor]]:
    """(row, whose embeddings it reads, an unfitted predictor)."""
    for baseline in (Popularity(), PreviousToken(), Oracle()):
        yield Row(baseline.kind), "sentence", baseline
    variants_of = {
        "sentence": SEARCHES | PARTS,
        "sentence, start only": {"top-32, centred": SEARCHES["top-32, centred"]},
        "token_mean": SEARCHES | {"default: all of it": {}},
    }
    for name, variants in variants_of.items():
        for variant, options in variants.items():
            predictor = Semantic(embedder=embedders[name], **options)
            yield Row("semantic", name, variant), name, predictor


def summary(reports: Sequence[RecallReport]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every published number."""
    values = {
        "recall@4": [report.recall for report in reports],
        "recall@8": [report.recall_by_fetched[8] for report in reports],
        "recall@4, 4 tokens ahead": [report.recall_by_lookahead[4] for report in reports],
        "calibration error": [report.reliability.expected_calibration_error for report in reports],
    }
    return {
        name: {
            "mean": float(np.mean(numbers)),
            "sd": float(np.std(numbers, ddof=1)),
            "each": numbers,
        }
        for name, numbers in values.items()
    } | {"num_test_tokens": [report.num_tokens for report in reports]}


@dataclass
class Args:
    """Compare embedders and the parts of `semantic`; max_tokens judges only so many per split."""

    max_tokens: int | None = None
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    torch.set_num_threads(1)  # tensors of 768 numbers: threads only wait for each other

    traces = load_traces("gptoss20b")
    assert isinstance(traces, TraceList)
    embedders: dict[str, Embedder] = {
        "sentence": SentenceEmbedder(),
        "sentence, start only": SentenceEmbedder(max_windows=1),
        "token_mean": TokenMeanEmbedder(),
    }
    with_vectors = {name: embedded(traces, embedder) for name, embedder in embedders.items()}
    reports: dict[tuple[str, Row], list[RecallReport]] = defaultdict(list)
    work = [
        (way, split, *configuration)
        for way, _, split in splits(traces)
        for configuration in configurations(embedders)
    ]
    for way, split, row, vectors, predictor in tqdm(work, unit="fit"):
        judged = replace(with_vectors[vectors], split=split)
        predictor.fit(judged)
        report = evaluate_recall(predictor, judged, max_tokens=args.max_tokens)
        reports[way, row].append(report)

    results = []
    for way in ("topic", "request"):
        print(f"\nsplit by {way}: mean (sd) over {len(SEEDS)} seeds")
        print(f"{'':74} recall@4        recall@8        4 ahead         calibration")
        for (of_way, row), of_row in reports.items():
            if of_way == way:
                numbers = summary(of_row)
                results.append({"split_by": way, **vars(row), **numbers})
                name = f"{row.predictor:15} {row.embedder:21} {row.variant}"
                cells = [f"{n['mean']:.3f} ({n['sd']:.3f})" for n in list(numbers.values())[:4]]
                print(f"{name:74} " + "   ".join(cells))
    outcome = {
        "traces": traces.spec.describe(),
        "traces_digest": traces.digest,
        "num_requests": len(traces),
        "seeds": SEEDS,
        "embedders": {
            name: {"config": e.config(), "fingerprint": e.fingerprint}
            for name, e in embedders.items()
        },
        "results": results,
    }
    record("embedders", outcome, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
