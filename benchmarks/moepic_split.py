"""How well MoEpic's memory is divided: equal shares, Algorithm 1, and the best division.

    python -m benchmarks.moepic_split                     # ten minutes of one core
    python -m benchmarks.moepic_split max_tokens=200      # a look

Half of a trace's requests are counted, the other half is replayed: caches of tops with the LCP
policy, evicting on a miss, and prefetching in the order of a prediction made one layer ahead, as
far as the window reaches. Each token then waits what Eqs 5 to 7 say for what was really there.
Beside it stands what the model had expected, which is what the divisions minimise.

Rows: everything whole (theta = 1), the paper's start (theta = 0.5), equal memory with the paper's
choice of C, Algorithm 1 and dynamic programming (`runtime.split_budget`). Two machines: a fast GPU
on PCIe 5, where a token's experts travel ten times as long as they compute, and the paper's, where
that is three times. Their times are constants below, so the comparison is the same everywhere.

Traces have no hidden states, so that router reuse cannot be replayed: `markov` predicts the next
layer from this one's experts. A seed is another half of the requests.

Ends with one JSON line; ``out=benchmarks/results/moepic_split.json`` keeps it.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.router_inputs import RoutedTokens
from data.schema import Split, Trace, TraceList
from data.tables import format_table
from predictors.markov import Markov
from predictors.routing import expert_use_TLE, traces_of
from runtime.cache import ExpertCache
from runtime.policies.lcp import Lcp
from runtime.split_budget import (
    Floats,
    LayerStatistics,
    SplitPlan,
    SplitStatistics,
    SplitTimes,
    allocate,
    allocate_optimally,
    expert_split,
    stall_of,
)

# The first from DESIGN's measurements of gpt-oss-20b (49.8 MB an expert, 51 GB/s); the second has
# MoEpic's 165 ms of loading against 57 ms of computing a token, 24 layers, 4 of 60 experts.
MACHINES = {
    "H200, PCIe 5": SplitTimes(attention_s=1.7e-4, moe_s=8e-5, head_s=4e-4, load_s=9.8e-4),
    "MoEpic's": SplitTimes(attention_s=1.1e-3, moe_s=1.2e-3, head_s=1.5e-3, load_s=1.72e-3),
}
TRACES = ("gptoss20b", "esft_law", "esft_intent")


@dataclass
class Args:
    """Divide memory in several ways and replay each; residencies are shares of all experts."""

    traces: list[str] = field(default_factory=lambda: list(TRACES))
    residencies: list[float] = field(default_factory=lambda: [0.17, 0.375])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_tokens: int = 1500
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Consecutive tokens: what they use, bool [T, L, E], and what was predicted of it, float64."""

    used_TLE: np.ndarray[Any, np.dtype[np.bool_]]
    said_TLE: Floats


def predicted(traces: Sequence[Trace], markov: Markov, max_tokens: int) -> Tokens:
    """Requests one after the other, and the prediction of each layer from the one before."""
    spec = markov.fitted_spec()
    used, said, num_tokens = [], [], 0
    for trace in traces:
        rows = min(trace.num_tokens, max_tokens - num_tokens)
        if not rows:
            break
        maps = [trace.expert_map_LE(t, spec.num_experts) for t in range(rows)]
        walked = markov.walk_layers(
            RoutedTokens(
                starts_N=torch.arange(rows) == 0,
                token_ids_N=torch.zeros(rows, dtype=torch.int64),
                topk_expert_ids_LNK=torch.from_numpy(
                    trace.topk_expert_ids_TLK[:rows].astype(np.int64)
                ).transpose(0, 1),
                router_probs_LNE=torch.from_numpy(np.stack(maps)).transpose(0, 1),
                router_input_LND=None,
            )
        )
        ahead_TLE = walked.ahead_LNHE[:-1, :, 0].transpose(0, 1)
        first_TLE = walked.before_NLE[:, :1]
        said.append(torch.cat([first_TLE, ahead_TLE], 1).nan_to_num(0.0).double().numpy())
        used.append(expert_use_TLE(trace, spec.num_experts)[:rows].astype(bool))
        num_tokens += rows
    return Tokens(np.concatenate(used), np.concatenate(said))


def count(tokens: Tokens, top_k: int) -> list[LayerStatistics]:
    """The counts behind the model; priorities come from LCP as they stand before each token."""
    _, num_layers, num_experts = tokens.used_TLE.shape
    statistics_ = SplitStatistics(num_layers=num_layers, num_experts=num_experts, top_k=top_k)
    policy = Lcp()
    cache = ExpertCache(
        policy, num_layers=num_layers, num_experts=num_experts, slots=num_experts, with_slots=False
    )
    for used_LE, said_LE in zip(tokens.used_TLE, tokens.said_TLE, strict=True):
        priority_LE = policy.keep_scores(cache.usage, None).double().numpy()
        for layer in range(num_layers):
            statistics_.add(
                layer,
                priority_E=priority_LE[layer],
                used_E=used_LE[layer],
                said_E=said_LE[layer],
            )
        cache.step(torch.from_numpy(used_LE))
    return statistics_.layers()


def replay(tokens: Tokens, plan: SplitPlan, times: SplitTimes, top_k: int) -> float:
    """Mean seconds that a token waits, with what its caches and prefetches really held."""
    _, num_layers, num_experts = tokens.used_TLE.shape
    cache = ExpertCache(
        Lcp(),
        num_layers=num_layers,
        num_experts=num_experts,
        slots=torch.from_numpy(plan.cached_L),
        with_slots=False,
    )
    resident_LE = cache.usage.resident_LE.numpy()  # the live state
    share_L = plan.share_L
    total_s = 0.0
    for used_LE, said_LE in zip(tokens.used_TLE, tokens.said_TLE, strict=True):
        window_s = times.head_s + times.attention_s
        for layer in range(num_layers):
            here_E = resident_LE[layer] * share_L[layer]
            order_Y = np.argsort(-said_LE[layer], kind="stable")
            loaded_Y = ((1 - here_E[order_Y]).cumsum() * times.load_s) <= window_s
            here_E[order_Y[loaded_Y]] = 1.0
            present = float(here_E[used_LE[layer]].sum())
            hide_s = present * times.moe_s / top_k
            miss_s = (top_k - present) * times.load_s
            total_s += max(0.0, miss_s - hide_s)
            window_s = times.moe_s - min(hide_s, miss_s) + times.attention_s
        cache.step(torch.from_numpy(used_LE))
    return total_s / len(tokens.used_TLE)


def divisions(
    memory: float, layers: Sequence[LayerStatistics], times: SplitTimes
) -> dict[str, Callable[[], SplitPlan]]:
    """The ways to divide, by name."""
    num_layers, most = len(layers), layers[0].num_experts
    equal_L = np.full(num_layers, memory / num_layers)

    def cut_at(share: float) -> SplitPlan:
        # Whole slots: a cache of so many tops, and the share that memory allows them.
        cached_L = np.minimum(most, np.maximum(1, np.floor(equal_L / share))).astype(np.int64)
        memory_L = np.minimum(equal_L, cached_L)
        return SplitPlan(memory_L, cached_L, stall_of(memory_L, cached_L, layers, times))

    return {
        "whole experts": lambda: cut_at(1.0),
        "halves": lambda: cut_at(0.5),
        "equal memory": lambda: expert_split(equal_L, layers, times),
        "Algorithm 1": lambda: allocate(memory, layers, times),
        "optimal": lambda: allocate_optimally(memory, layers, times),
    }


def measure(traces: TraceList, seed: int, args: Args) -> list[dict[str, Any]]:
    """All divisions of one half of the requests, replayed on the other."""
    order = np.random.default_rng(seed).permutation(len(traces.traces))
    half: dict[str, Split] = {
        traces.traces[i].request_id: "fit" if place % 2 else "test" for place, i in enumerate(order)
    }
    traces = dataclasses.replace(traces, split=half)
    markov = Markov()
    markov.fit(traces)
    spec = traces.spec
    counted, judged = (
        predicted(list(traces_of(traces, split)), markov, args.max_tokens)
        for split in ("fit", "test")
    )
    layers = count(counted, spec.top_k)
    rows = []
    for machine, times in MACHINES.items():
        for residency in args.residencies:
            memory = residency * spec.num_layers * spec.num_experts
            for name, divide in divisions(memory, layers, times).items():
                plan = divide()
                rows.append(
                    {
                        "machine": machine,
                        "residency": residency,
                        "division": name,
                        "expected_stall_ms": 1e3 * plan.stall_s,
                        "stall_ms": 1e3 * replay(judged, plan, times, spec.top_k),
                        "share": float(np.average(plan.share_L, weights=plan.cached_L)),
                        "memory_spread": float(plan.memory_L.std() / plan.memory_L.mean()),
                    }
                )
    return rows


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    work = [(name, seed) for name in args.traces for seed in args.seeds]
    for name, seed in tqdm(work, desc="Traces x seeds", unit="run"):
        traces = load_traces(name)
        assert isinstance(traces, TraceList)
        for row in measure(traces, seed, args):
            at = (name, row["machine"], f"{row['residency']:.3g}", row["division"])
            runs.setdefault(at, []).append(row)
    cells, outcome = [], []
    for key, rows in runs.items():
        summary: dict[str, Any] = {}
        for column in ("expected_stall_ms", "stall_ms", "share", "memory_spread"):
            values = [row[column] for row in rows]
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[column] = {"mean": statistics.mean(values), "sd": sd}
        outcome.append(dict(zip(("trace", "machine", "residency", "division"), key, strict=True)))
        outcome[-1].update(summary)
        waited = f"{summary['stall_ms']['mean']:.2f} ({summary['stall_ms']['sd']:.2f})"
        expected = f"{summary['expected_stall_ms']['mean']:.2f}"
        cells.append([*key, waited, expected, f"{summary['share']['mean']:.2f}"])
    header = ["trace", "machine", "resident", "division", "stall ms", "expected", "theta"]
    print(format_table(header, cells))
    record("moepic_split", {"seeds": args.seeds, "rows": outcome}, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
