"""Bytes that a batch needs per token, when those run together who are forecast to be alike.

    python -m benchmarks.batch_scheduling                               # gpt-oss-20b's routing
    python -m benchmarks.batch_scheduling batches=4 predictors=oracle tokens=32

Replays the decode steps of recorded requests of one model, in batches that sequences enter and
leave at their own times: whenever one ends, the scheduler chooses among ``waiting`` others. Of each
batch size and scheduler it tells the distinct experts per layer and step, their bytes per token,
and what an LRU cache of ``residency`` misses of them.

Schedulers: first in, first out; `runtime.server.overlap.order`, which is what serves, by the
forecast that a fitted predictor makes from the prompt alone (``on_request``); and by the truth
about each request (its mean use): what a perfect forecast of requests would give, and no bound on
what knowing every token would. Predictors are fitted on the requests of split "fit"; those replayed
are of split "test".

Arrival order is random with ``seeds`` different seeds; all schedulers see the same ones. Ends with
one line of JSON.

Shape letters: B sequences of the batch · T tokens · L MoE layers · E experts per layer.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from data.importers import load_traces
from data.schema import MoESpec, Trace
from data.tables import format_table
from predictors.base import Request
from predictors.embedders.sentence import SentenceEmbedder
from predictors.registry import predictor_class
from predictors.routing import decode_rows, expert_use_TLE, request_use_LE, traces_of
from predictors.semantic import Semantic
from runtime.budget import slots_at
from runtime.cache import ExpertCache
from runtime.policies import make_policy
from runtime.server.overlap import MAX_OVERTAKEN, order

# One expert of gpt-oss-20b in bfloat16, where a trace does not say.
_EXPERT_BYTES = 49_800_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is replayed.

    Attributes:
        traces: Recorded routing, by name or path.
        batches: Sequences that run together.
        predictors: By whose forecasts, oracle for the truth; those that tell requests apart before
            they begin.
        waiting: Sequences to choose among.
        tokens: Of each sequence at most.
        requests: At most so many.
        residency: Of the cache.
        max_overtaken: The scheduler's bound on waiting.
        seeds: Orders of arrival.
        out: Where to keep the result, or "".
    """

    traces: str = "gptoss20b"
    batches: tuple[int, ...] = (4, 16)
    predictors: tuple[str, ...] = ("oracle", "semantic")
    waiting: int = 32
    tokens: int = 64
    requests: int = 96
    residency: float = 0.25
    max_overtaken: int = MAX_OVERTAKEN
    seeds: int = 3
    out: str = ""


ForecastOf = Callable[[int], Tensor | None]


@dataclass(kw_only=True)
class Cost:
    """What a replay has needed.

    Attributes:
        steps: Forward passes.
        tokens: Of all sequences.
        distinct: Experts that the steps needed, layer by layer.
        misses: Those that were not in the cache.
        waited: By how many later arrivals each sequence was overtaken.
    """

    steps: int = 0
    tokens: int = 0
    distinct: int = 0
    misses: int = 0
    waited: list[int] = field(default_factory=list)


def replay(
    uses: Sequence[Tensor],
    arrivals: Sequence[int],
    *,
    batch: int,
    waiting: int,
    slots: int,
    forecast_of: ForecastOf | None,
    max_overtaken: int,
) -> Cost:
    """Run all sequences, each to its end.

    Args:
        uses: bool [T, L, E] of each sequence.
        arrivals: Their order; so many as ``waiting`` are there to choose from.
        batch: Places.
        waiting: See above.
        slots: Of each layer of the LRU cache.
        forecast_of: What is expected of a sequence; None for first in, first out.
        max_overtaken: See `order`.
    """
    num_layers, num_experts = uses[0].shape[1:]
    cache = ExpertCache(
        make_policy("lru"),
        num_layers=num_layers,
        num_experts=num_experts,
        slots=torch.full((num_layers,), slots),
    )
    by_name = None if forecast_of is None else _by_name(forecast_of)
    cost, running, overtaken = Cost(), dict[int, int](), dict[str, int]()
    queue = list(arrivals)
    while queue or running:
        places = batch - len(running)
        if places and queue:
            choice = queue[:waiting]
            if by_name is None:
                taken = choice[:places]
            else:
                names = order(
                    [str(i) for i in choice],
                    [str(i) for i in running],
                    by_name,
                    places=places,
                    overtaken=overtaken,
                    max_overtaken=max_overtaken,
                )
                taken = [int(name) for name in names[:places]]
            for index in taken:
                for older in choice[: choice.index(index)]:
                    if older not in taken:
                        overtaken[str(older)] = overtaken.get(str(older), 0) + 1
                queue.remove(index)
                running[index] = 0
                cost.waited.append(overtaken.get(str(index), 0))
        needed_LE = torch.stack([uses[i][at] for i, at in running.items()]).any(dim=0)
        step = cache.step(needed_LE)
        cost.steps += 1
        cost.tokens += len(running)
        cost.distinct += int(needed_LE.sum())
        cost.misses += int((step.insert_LE | step.streamed_LE).sum())
        running = {i: at + 1 for i, at in running.items() if at + 1 < len(uses[i])}
    return cost


def _by_name(forecast_of: ForecastOf) -> Callable[[str], Tensor | None]:
    return lambda name: forecast_of(int(name))


def forecasts(name: str, traces: Any, tested: Sequence[Trace]) -> ForecastOf:
    """What predictor ``name`` says of each request from its prompt alone; the oracle the truth."""
    num_experts = traces.spec.num_experts
    if name == "oracle":
        said: list[Tensor | None] = [
            torch.from_numpy(request_use_LE(trace, num_experts)) for trace in tested
        ]
    else:
        predictor = (
            Semantic(embedder=SentenceEmbedder()) if name == "semantic" else predictor_class(name)()
        )
        predictor.fit(traces)
        said = []
        for trace in tested:
            forecast = predictor.on_request(predictor.new_state(), Request.of(trace))
            said.append(None if forecast is None else forecast.next_LE)
    return lambda index: said[index]


def run(options: Options) -> list[dict[str, Any]]:
    """A row for each batch size and scheduler."""
    traces = load_traces(options.traces)
    tested = [t for t in traces_of(traces, "test") if t.num_tokens > options.tokens // 2]
    tested = tested[: options.requests]
    spec: MoESpec = traces.spec
    uses = [
        torch.from_numpy(
            expert_use_TLE(trace, spec.num_experts)[decode_rows(trace)][: options.tokens]
        ).bool()
        for trace in tested
    ]
    orders = []
    for seed in range(options.seeds):
        arrivals = list(range(len(tested)))
        random.Random(seed).shuffle(arrivals)
        orders.append(arrivals)
    slots = slots_at(options.residency, spec)
    slots_per_layer = slots if isinstance(slots, int) else int(np.mean(slots))
    expert_bytes = (spec.expert_bytes_per_layer or (_EXPERT_BYTES,))[0]
    schedulers: dict[str, ForecastOf | None] = {"fifo": None}
    for name in options.predictors:
        schedulers[name] = forecasts(name, traces, tested)
    rows = []
    for batch in options.batches:
        for name, forecast_of in schedulers.items():
            costs = [
                replay(
                    uses,
                    arrivals,
                    batch=batch,
                    waiting=options.waiting,
                    slots=slots_per_layer,
                    forecast_of=forecast_of,
                    max_overtaken=options.max_overtaken,
                )
                for arrivals in orders
            ]
            rows.append(
                {
                    "batch": batch,
                    "scheduler": name,
                    "distinct_per_layer": spread(
                        [cost.distinct / cost.steps / spec.num_layers for cost in costs]
                    ),
                    "bytes_per_token": spread(
                        [cost.distinct * expert_bytes / cost.tokens for cost in costs]
                    ),
                    "missed_bytes_per_token": spread(
                        [cost.misses * expert_bytes / cost.tokens for cost in costs]
                    ),
                    "most_overtaken": max(max(cost.waited) for cost in costs),
                }
            )
    return rows


def main(arguments: list[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    rows = run(options)
    table = []
    for row in rows:
        fifo = next(r for r in rows if r["batch"] == row["batch"])
        cells = []
        for key in ("bytes_per_token", "missed_bytes_per_token"):
            value, base = row[key]["median"], fifo[key]["median"]
            cells.append(f"{value / 1e9:.3f} ({value / base - 1:+.1%})")
        table.append(
            [
                f"{row['batch']} {row['scheduler']}",
                f"{row['distinct_per_layer']['median']:.2f}",
                *cells,
                str(row["most_overtaken"]),
            ]
        )
    header = ["batch, scheduler", "experts/layer", "GB/token", "missed GB/token", "overtaken"]
    print(format_table(header, table))
    record(
        "batch_scheduling",
        {"options": as_json(options), "rows": rows},
        out=Path(options.out) if options.out else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
