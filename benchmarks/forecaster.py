"""How much of the way to Belady's optimum the learned forecaster closes, on requests never seen.

    python -m benchmarks.forecaster                    # half an hour on two cores
    python -m benchmarks.forecaster num_nets=3          # three networks averaged
    python -m benchmarks.forecaster seeds=[0] max_tokens=3000
    python -m benchmarks.forecaster traces=[esft] time_all=false   # one set of traces alone

Real routing (folder MOECAST_DATA), everything fitted anew for every seed, which draws the split,
the weights and the order:

- **gpt-oss-20b**, tested on subjects that were not fitted: the gap between LFRU and Belady closed
  at 8, 13 and 16 of 32 slots, and slot recall of the next token. Once with token ids, where the
  next token's id is known as it is in serving; once with the ids of past tokens only, the finished
  one's among them; once without any, from routing alone.
- **DeepSeek-V2-Lite** (esft), fitted on one of its two domains and tested on the other, at 16, 26
  and 32 of 64 slots.
- **Cost**: the fit's time on all 98,777 recorded tokens of gpt-oss-20b (`benchmarks.fit_speed`),
  and on a GPU the networks' time for one token, captured in a CUDA graph.

Ends with one JSON line; ``out=benchmarks/results/forecaster.json`` keeps it.
"""

import copy
import dataclasses
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fit_speed import time_fits
from benchmarks.record import record, spread
from data.cli import parse_cli
from data.importers import load_traces
from data.schema import TraceList
from data.splits import split_by_topic
from data.tables import format_table
from predictors.forecaster import Forecaster
from predictors.metrics import evaluate_recall
from predictors.routing import traces_of
from predictors.token_history import NUM_ROWS, NUM_TOKENS_READ
from runtime.budget import slots_at
from runtime.simulate import simulate

RESIDENCIES = (0.25, 0.4, 0.5)
POLICIES = ("lru", "lfru", "belady", "forecast")
ESFT_DOMAINS = ("intent", "law")
TRACES = {"gpt-oss-20b": "gptoss20b", "esft": "esft"}


@dataclass
class Args:
    """Fit and judge the forecaster; max_tokens judges only so many tokens per split.

    traces may name gpt-oss-20b and esft; device is auto, cpu or gpu; time_all=false leaves the fit
    on all tokens out, past_ids=false the setting with the ids of past tokens only.
    """

    traces: list[str] = field(default_factory=lambda: list(TRACES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_nets: int = 1
    hidden_dim: int = 1024
    max_tokens: int | None = None
    device: str = "auto"
    time_all: bool = True
    past_ids: bool = True
    out: Path | None = None


def without_ids(traces: TraceList) -> TraceList:
    """The same routing with nothing known of the tokens."""
    return dataclasses.replace(
        traces, traces=[dataclasses.replace(trace, token_ids_P=None) for trace in traces.traces]
    )


def with_past_ids(traces: TraceList) -> TraceList:
    """The same routing, each token bearing the id of the one before it.

    What a forecaster is told as the next token's id is then the finished one's: it knows the ids of
    the past, and not what was sampled. Copies look one token back too.
    """
    moved = []
    for trace in traces.traces:
        ids_P = trace.token_ids_P
        if ids_P is not None:
            ids_P = np.concatenate([np.array([-1], ids_P.dtype), ids_P[:-1]])
        moved.append(dataclasses.replace(trace, token_ids_P=ids_P))
    return dataclasses.replace(traces, traces=moved)


def settings_of(
    traces: TraceList, name: str, seed: int, *, past_ids: bool = True
) -> dict[str, TraceList]:
    """What is fitted and judged with one seed, by the name under which it is reported."""
    topics = {trace.request_id: trace.topic for trace in traces.traces}
    if name == "esft":
        splits = {
            domain: split_by_topic(topics, seed=seed, test_topics=[domain])
            for domain in ESFT_DOMAINS
        }
        return {
            f"esft, tested on {domain}": dataclasses.replace(traces, split=split)
            for domain, split in splits.items()
        }
    known = dataclasses.replace(traces, split=split_by_topic(topics, seed=seed))
    past = {f"{name}, ids of past tokens": with_past_ids(known)} if past_ids else {}
    return {name: known, **past, f"{name}, no token ids": without_ids(known)}


def measure(traces: TraceList, predictor: Forecaster, max_tokens: int | None) -> dict[str, Any]:
    """Fit on the "fit" requests, judge on the "test" requests."""
    report = predictor.fit(traces)
    recall = evaluate_recall(predictor, traces, max_tokens=max_tokens)
    test = dataclasses.replace(traces, traces=list(traces_of(traces, "test")))
    slots = {slots_at(residency, traces.spec): residency for residency in RESIDENCIES}
    results = simulate(
        test, policies=POLICIES, slots=list(slots), predictor=predictor, max_tokens=max_tokens
    )
    K = traces.spec.top_k
    return {
        "fit_s": report.fit_s,
        "num_fit_tokens": report.num_tokens,
        "num_test_tokens": recall.num_tokens,
        "parameters": report.details["num_parameters"],
        "recall": {k: recall.recall_by_fetched[k] for k in (K, 2 * K)},
        "calibration_error": recall.reliability.expected_calibration_error,
        "gap_closed": {str(r.slots): r.gap_closed for r in results if r.policy == "forecast"},
        "hit_ratio": {
            policy: {str(r.slots): r.hit_ratio for r in results if r.policy == policy}
            for policy in POLICIES
        },
    }


def graph_us_per_token(predictor: Forecaster, *, repeats: int = 7) -> dict[str, float]:
    """Microseconds of one token's networks on the GPU, in one graph; spread over ``repeats``."""
    spec = predictor.fitted_spec()
    rows_BRLE = torch.rand(1, NUM_ROWS, spec.num_layers, spec.num_experts, device="cuda")
    tokens_B3 = torch.zeros(1, NUM_TOKENS_READ, dtype=torch.int64, device="cuda")
    nets = [copy.deepcopy(net).cuda() for net in predictor.nets]

    def run() -> None:
        for net in nets:
            net.after(net.before(rows_BRLE, tokens_B3), rows_BRLE)

    with torch.inference_mode():
        run()  # compiles kernels and makes handles before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times_us = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(200):
                graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times_us.append(start.elapsed_time(stop) / 200 * 1000)
    return spread(times_us)


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the numbers that are published."""

    def over_seeds(values: list[float]) -> dict[str, Any]:
        sd = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "sd": sd, "each": values}

    return {
        name: {key: over_seeds([run[name][key] for run in runs]) for key in runs[0][name]}
        for name in ("recall", "gap_closed")
    } | {name: over_seeds([run[name] for run in runs]) for name in ("fit_s", "calibration_error")}


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = {"accelerator": args.device}
    if unknown := set(args.traces) - set(TRACES):
        raise SystemExit(f"traces={sorted(unknown)}: must be among {', '.join(TRACES)}")
    sets: dict[str, TraceList] = {}
    for name in args.traces:
        loaded = load_traces(TRACES[name])
        assert isinstance(loaded, TraceList)
        sets[name] = loaded

    def forecaster(seed: int) -> Forecaster:
        return Forecaster(
            num_nets=args.num_nets, hidden_dim=args.hidden_dim, seed=seed, trainer=trainer
        )

    timed: dict[str, Any] = {}
    if args.time_all and "gpt-oss-20b" in sets:
        fitted, timed = time_fits(sets["gpt-oss-20b"], lambda: forecaster(0))
        if torch.cuda.is_available():
            timed["graph_us_per_token"] = graph_us_per_token(fitted)
            print(f"one token on the GPU: {timed['graph_us_per_token']['median']:.0f} us")
        print(f"fit on all {timed['num_all_tokens']:,} tokens: {timed['fit_all_s']:.0f} s")
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        settings: dict[str, TraceList] = {}
        for name, traces in sets.items():
            settings |= settings_of(traces, name, seed, past_ids=args.past_ids)
        for name, traces in settings.items():
            print(f"seed {seed}: {name}", file=sys.stderr)
            run = measure(traces, forecaster(seed), args.max_tokens)
            runs.setdefault(name, []).append(run)
            closed = ", ".join(f"{slots}: {gap:.1%}" for slots, gap in run["gap_closed"].items())
            recall = ", ".join(f"{k}: {share:.1%}" for k, share in run["recall"].items())
            print(f"seed {seed}: {name}: gap {closed}; recall {recall}", file=sys.stderr)
    outcome: dict[str, Any] = {
        "seeds": args.seeds,
        "num_nets": args.num_nets,
        "device": _device(args.device),
        **timed,
        "settings": {
            name: {"summary": summarize(of_name), "runs": of_name} for name, of_name in runs.items()
        },
    }
    print(_table(outcome))
    record("forecaster", outcome, out=args.out)


def _device(asked: str) -> str:
    if asked != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _table(outcome: dict[str, Any]) -> str:
    header = ["traces", "recall@K", "recall@2K", *(f"gap at {r:.0%}" for r in RESIDENCIES), "fit s"]
    rows = []
    for name, setting in outcome["settings"].items():
        summary = setting["summary"]
        numbers = [*summary["recall"].values(), *summary["gap_closed"].values()]
        cells = [f"{100 * n['mean']:.1f} ({100 * (n['sd'] or 0):.1f})" for n in numbers]
        rows.append([name, *cells, f"{summary['fit_s']['mean']:.0f}"])
    return format_table(header, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
