"""Do the policy orderings that FineMoE and MoEpic publish come out on real traces; if not, why?

    python -m benchmarks.paper_orderings                   # three minutes of one core
    python -m benchmarks.paper_orderings max_tokens=300    # a look

Three tables, hit ratios throughout:

- `moepic`: Table 1 of MoEpic, random < LRU < LFU < LCP, with a cache per layer that holds 1/6 to
  5/6 of the experts, as there. A seed is another order of the requests (and of the random draws);
  traces of a single request have one order.
- `finemoe`: Fig. 14b of FineMoE, LRU < LFU < LFU weighted by probability, the probability coming
  from each predictor that is named. A seed is another split; predictors are fitted and calibrated
  on its fit and val requests, and all policies replay its test requests.
- `pool`: the same policies where all layers share one pool, as they do in FineMoE and SpecMD.

And four explanations: `aging` (LFU that forgets: half-lives, per request, per stay; LCP that does
so sooner), `shuffled` (the same tokens in another order, which destroys recency and leaves
frequency), `locality` (what recency, popularity and the request are worth in a trace, without any
policy) and `stays` (what becomes of the experts that a cache loads).

Every replay stops after ``max_tokens`` tokens (pools after a sixth of that: each of their tokens is
as many events as there are layers). Orderings of predictors, FineMoE's Fig. 14a and eMoE's Table 2,
are measured by benchmarks of their own.

Ends with one JSON line; ``out=benchmarks/results/paper_orderings.json`` keeps it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.embedders import embedded
from benchmarks.frequency_policies import (
    LfuOfEachRequest,
    LfuOfEachStay,
    LfuWithHalfLife,
    ProbabilityTimesCount,
    ProbabilityTimesRecentUse,
)
from benchmarks.locality import locality, shuffled
from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.schema import TraceList
from data.splits import split_by_topic
from predictors.base import Predictor
from predictors.embedders.sentence import SentenceEmbedder
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.semantic import Semantic
from runtime.policies import make_policy
from runtime.policies.base import Policy
from runtime.policies.lcp import Lcp
from runtime.policies.least_stale import LeastStale
from runtime.policies.random import Random
from runtime.replay import EventList
from runtime.simulate import replay_log, simulate

SEEDS = (0, 1, 2)
SIXTHS = (1, 2, 3, 4, 5)
SHARES = (0.25, 0.4, 0.5)
HALF_LIVES = (16, 32, 128, 512)  # in tokens
EXPLAINED = "gptoss20b"  # the set that has enough requests, and where the orders fail
MOEPIC_ORDER = ("random", "lru", "lfu", "lcp")
FINEMOE_ORDERS = {
    # How often an expert was used: since the start, as our LFU counts, while it was resident, or of
    # late, which is not the paper's but may be what its requests make of LFU.
    "since the start": ("lru", "lfu", "p * count"),
    "of each stay": ("lru", "lfu of each stay", "finemoe"),
    "half-life 32": ("lru", "lfu, half-life 32", "p * lfu, half-life 32"),
}
ALL_EQUAL_POINTS = 0.01  # next to nothing is evicted
# MoEpic's Table 1 at 10 of 60 experts, top-4. LRU then still holds all experts of the previous
# token, so that no more than this share of a token's experts can have been used by the one before.
PUBLISHED_LRU_HIT_RATIO = 0.1911
PUBLISHED = "Qwen1.5-MoE on MMLU, 10 of 60 experts: RND 16.41, LRU 19.11, LFU 24.36, LCP 25.56 %"


Table = Literal["moepic", "aging", "shuffled", "finemoe", "pool"]


@dataclass(frozen=True)
class Row:
    """What one line of a table is about, apart from its seeds."""

    table: Table
    trace: str
    variant: str  # the order of the tokens, or the predictor behind p; "" where there is no choice
    policy: str
    slots: int


Measured = dict[Row, list[dict[str, float | None]]]


def named(*names: str) -> dict[str, Policy]:
    """Policies under their own names."""
    return {name: make_policy(name) for name in names}


@dataclass
class Bench:
    """One trace's replays; every call of `replay` adds a seed to the rows that it is about."""

    trace: str
    max_tokens: int
    measured: Measured

    def replay(
        self,
        table: Table,
        traces: TraceList,
        policies: Mapping[str, Policy],
        slots: Sequence[int],
        *,
        variant: str = "",
        predictor: Predictor | None = None,
        in_pool: bool = False,
    ) -> None:
        """Hit ratios (of decoding, where that was recorded) and gaps closed, side by side."""
        results = simulate(
            traces,
            policies=list(policies.values()),
            slots=slots,
            scope="global" if in_pool else "layer",
            predictor=predictor,
            with_truth=predictor is not None and predictor.needs_truth,
            max_tokens=max(1, self.max_tokens // 6) if in_pool else self.max_tokens,
            progress=False,
        )
        labels = [(policy, count) for policy in policies for count in slots]
        for (policy, count), result in zip(labels, results, strict=True):
            decode = result.decode_hit_ratio
            row = Row(table, self.trace, variant, policy, count)
            self.measured.setdefault(row, []).append(
                {
                    "hit_ratio": result.hit_ratio if decode is None else decode,
                    "gap_closed": result.gap_closed,
                }
            )


def in_order(traces: TraceList, seed: int) -> TraceList:
    """The requests in the order of a seed."""
    order = np.random.default_rng(seed).permutation(len(traces))
    return replace(traces, traces=[traces.traces[i] for i in order])


def measure_moepic(bench: Bench, traces: TraceList) -> None:
    """Table 1, and on the trace where it fails, what explains that."""
    num_experts, top_k = traces.spec.num_experts, traces.spec.top_k
    slots = sorted({max(top_k, round(num_experts * sixth / 6)) for sixth in SIXTHS})
    for seed in SEEDS:
        ordered = in_order(traces, seed)
        policies = {"random": Random(seed=seed), **named("lru", "lfu", "lcp", "lfru", "belady")}
        bench.replay("moepic", ordered, policies, slots)
        if bench.trace != EXPLAINED:
            continue
        aging: dict[str, Policy] = {
            f"lfu, half-life {half_life}": LfuWithHalfLife(half_life) for half_life in HALF_LIVES
        }
        events = EventList.of(ordered, max_tokens=bench.max_tokens)
        aging |= {"lfu of each request": LfuOfEachRequest(events)}
        aging |= {"lfu of each stay": LfuOfEachStay(), "lcp, omega 32": Lcp(omega=32)}
        bench.replay("aging", ordered, aging, slots[1:3])
        for variant, across in (("within each request", False), ("across requests", True)):
            mixed = shuffled(ordered, seed, across=across, max_tokens=bench.max_tokens)
            bench.replay("shuffled", mixed, policies, slots[1:3], variant=variant)


def measure_finemoe(
    bench: Bench, traces: TraceList, predictors: Mapping[str, Predictor], in_pool_by: str
) -> None:
    """Fig. 14b on the test requests of each split; in one pool too, by the predictor so named."""
    num_experts = traces.spec.num_experts
    slots = [round(num_experts * share) for share in SHARES]
    topics = {trace.request_id: trace.topic for trace in traces.traces}
    lfus: dict[str, Policy] = {"lfu of each stay": LfuOfEachStay()}
    lfus |= {"lfu, half-life 32": LfuWithHalfLife(32)}
    for seed in SEEDS:
        split = split_by_topic(topics, seed=seed)
        of_split = replace(traces, split=split)
        test = replace(of_split, traces=[t for t in traces.traces if split[t.request_id] == "test"])
        alone = named("lru", "lfu", "lfru", "lcp", "least_stale", "belady") | lfus
        bench.replay("finemoe", test, alone, slots)
        by_p = named("finemoe", "forecast") | {"p * count": ProbabilityTimesCount()}
        by_p |= {"p * lfu, half-life 32": ProbabilityTimesRecentUse(32)}
        for kind, predictor in predictors.items():
            predictor.fit(of_split)
            bench.replay("finemoe", test, by_p, slots, variant=kind, predictor=predictor)
        if in_pool_by:
            pool = {"random": Random(seed=seed), **named("lru", "lfu", "lcp", "lfru", "belady")}
            # A pool's step is a layer, so that half-lives would be layers: those rows are left out.
            pool |= {"least_stale": LeastStale(num_layers=traces.spec.num_layers)}
            pool |= {name: p for name, p in (lfus | by_p).items() if "half-life" not in name}
            bench.replay(
                "pool",
                test,
                pool,
                [num_experts // 6, *slots],
                variant=in_pool_by,
                predictor=predictors[in_pool_by],
                in_pool=True,
            )


def stays(traces: TraceList, slots: int, *, max_tokens: int) -> dict[str, dict[str, float]]:
    """What becomes of experts that a cache loads, by policy; of the stays that an eviction ended.

    Returns:
        `used_once`: share of stays in which the expert was not used again; `back_within_16`: share
        that was followed by a miss of the same expert at most 16 tokens later.
    """
    ids, num_left = [], max_tokens
    for trace in traces.traces:
        ids.append(replace(trace, topk_expert_ids_TLK=trace.topk_expert_ids_TLK[:num_left]))
        num_left -= ids[-1].num_tokens
        if num_left == 0:
            break
    first = replace(traces, traces=ids)
    found = {}
    policies = named("lru", "lfu", "lfru") | {"lfu of each stay": LfuOfEachStay()}
    for name, policy in policies.items():
        uses: dict[tuple[int, int], int] = {}
        left: dict[tuple[int, int], int] = {}
        ended = once = back = 0
        for event in replay_log(first, policy=policy, slots=slots, prefill="per_token"):
            expert = (event.layer, event.expert)
            if event.kind == "hit":
                uses[expert] += 1
            elif event.kind == "miss":
                uses[expert] = 1
                back += event.step - left.get(expert, -16) <= 16
            elif event.kind == "evict":
                ended += 1
                once += uses[expert] == 1
                left[expert] = event.step
        found[name] = {"used_once": once / ended, "back_within_16": back / ended}
    return found


def verdicts(measured: Measured) -> Iterator[dict[str, Any]]:
    """Each published order at each place where all its policies were measured."""
    for table, trace, variant, slots in dict.fromkeys(
        (row.table, row.trace, row.variant, row.slots) for row in measured
    ):
        orders = {"": MOEPIC_ORDER} if table in ("moepic", "shuffled") else FINEMOE_ORDERS
        for counting, order in orders.items():
            # What needs no forecast was measured once, for all predictors.
            rows = [
                next((row for row in same if row in measured), None)
                for same in ([Row(table, trace, v, p, slots) for v in (variant, "")] for p in order)
            ]
            if None in rows:
                continue
            hits = [[run["hit_ratio"] for run in measured[row]] for row in rows if row is not None]
            points = 100 * np.diff(np.array(hits, np.float64), axis=0)  # [steps, seeds]
            mean = points.mean(1)
            outcome = "holds" if (mean > 0).all() else "fails"
            if np.abs(mean).max() < ALL_EQUAL_POINTS:
                outcome = "all equal"
            yield {
                "table": table,
                "trace": trace,
                "variant": variant,
                "counting": counting,
                "slots": slots,
                "order": order,
                "outcome": outcome,
                "seeds_that_hold": int((points > 0).all(0).sum()),
                "points_mean": mean.round(4).tolist(),
                "points_sd": points.std(1, ddof=1).round(4).tolist(),
            }


def summary(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    found = {}
    for key in runs[0]:
        known = [value for value in (run[key] for run in runs) if value is not None]
        mean = round(float(np.mean(known)), 6) if known else None
        spread = round(float(np.std(known, ddof=1)), 6) if len(known) > 1 else None
        found[key] = {"mean": mean, "sd": spread, "each": [round(value, 6) for value in known]}
    return found


@dataclass
class Args:
    """Replay real traces under the papers' policies; max_tokens a replay, a sixth for pools."""

    max_tokens: int = 5000
    traces: list[str] | None = None
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print tables and the JSON line."""
    args = parse_cli(Args, argv)
    torch.set_num_threads(1)  # tensors this small: threads only wait for each other
    names = args.traces or ["gptoss20b", "esft_law", "esft_intent", "qwen", "gemma"]
    measured: Measured = {}
    digests, localities, lengths_of_stay = {}, {}, {}
    for name in tqdm(names, unit="trace"):
        traces = load_traces(name)
        assert isinstance(traces, TraceList)
        digests[name] = traces.digest
        bench = Bench(name, args.max_tokens, measured)
        measure_moepic(bench, traces)
        if len(traces) == 1:  # nothing to fit on
            continue
        sixths = [round(traces.spec.num_experts * sixth / 6) for sixth in (2, 3)]
        ordered = in_order(traces, SEEDS[0])
        localities[name] = locality(ordered, sixths, max_tokens=args.max_tokens)
        num_slots = traces.spec.num_experts // 4
        lengths_of_stay[name] = stays(ordered, num_slots, max_tokens=args.max_tokens // 5)
        predictors: dict[str, Predictor] = {
            "popularity": Popularity(),
            "previous_token": PreviousToken(),
        }
        has_text = any(trace.prompt for trace in traces.traces)
        if has_text:
            embedder = SentenceEmbedder()
            traces = embedded(traces, embedder)  # once for all splits
            predictors |= {"semantic": Semantic(embedder=embedder), "oracle": Oracle()}
        measure_finemoe(bench, traces, predictors, in_pool_by="semantic" if has_text else "")

    for row, runs in sorted(measured.items(), key=lambda item: list(asdict(item[0]).values())):
        numbers = summary(runs)
        hit, gap = numbers["hit_ratio"], numbers["gap_closed"]
        line = f"{row.table:9} {row.trace:12} {row.variant:20} {row.policy:20} {row.slots:4}"
        line += f"  {100 * hit['mean']:6.2f} ({100 * (hit['sd'] or 0):.2f}) %"
        print(line if gap["mean"] is None else f"{line}  gap {100 * gap['mean']:7.1f} %")
    judged = list(verdicts(measured))
    for verdict in judged:
        gains = zip(verdict["order"][1:], verdict["points_mean"], verdict["points_sd"], strict=True)
        steps = "".join(f" < {more} {mean:+.2f} ({sd:.2f})" for more, mean, sd in gains)
        where = [verdict[key] for key in ("table", "trace", "variant", "counting", "slots")]
        print(*where, verdict["outcome"], f"{verdict['order'][0]}{steps} points")
    record(
        "paper_orderings",
        {
            "traces_digests": digests,
            "seeds": SEEDS,
            "max_tokens": args.max_tokens,
            "published": {
                "moepic_table_1": PUBLISHED,
                "moepic_overlap_at_most": PUBLISHED_LRU_HIT_RATIO,
                "finemoe_fig_14b": "order only: LRU < LFU < probability-weighted LFU",
            },
            "locality": localities,
            "stays_at_a_quarter": lengths_of_stay,
            "verdicts": judged,
            "results": [{**asdict(row), **summary(runs)} for row, runs in measured.items()],
        },
        out=args.out,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
