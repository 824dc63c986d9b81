"""How much of the way to Belady's optimum the learned forecaster closes, on requests never seen.

    python -m benchmarks.forecaster                    # half an hour on two cores
    python -m benchmarks.forecaster num_nets=3          # three networks averaged
    python -m benchmarks.forecaster seeds=[0] max_tokens=3000
    python -m benchmarks.forecaster traces=[esft]   # one set of traces alone
    python -m benchmarks.forecaster jobs=6              # ten minutes on a GPU and sixteen cores

Real routing (folder MOECAST_DATA), everything fitted anew for every seed, which draws the split,
the weights and the order:

- **gpt-oss-20b**, tested on subjects that were not fitted: the gap between LFRU and Belady closed
  at 8, 13 and 16 of 32 slots, and slot recall of the next token. Once with token ids, where the
  next token's id is known as it is in serving; once with the ids of past tokens only, the finished
  one's among them; once without any, from routing alone.
- **DeepSeek-V2-Lite** (esft), fitted on one of its two domains and tested on the other, at 16, 26
  and 32 of 64 slots.

What it costs is measured apart: a fit by `benchmarks.fit_speed`, a token by
`benchmarks.forecaster_graph`.

Ends with one JSON line; ``out=benchmarks/results/forecaster.json`` keeps it.
"""

import dataclasses
import logging
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.schema import TraceList
from data.splits import split_by_topic
from data.tables import format_table
from predictors.forecaster import Forecaster
from predictors.metrics import evaluate_recall
from predictors.routing import traces_of
from runtime.budget import slots_at
from runtime.simulate import simulate

RESIDENCIES = (0.25, 0.4, 0.5)
POLICIES = ("lru", "lfru", "belady", "forecast")
ESFT_DOMAINS = ("intent", "law")
TRACES = {"gpt-oss-20b": "gptoss20b", "esft": "esft"}


@dataclass
class Args:
    """Fit and judge the forecaster; max_tokens judges only so many tokens per split.

    traces may name gpt-oss-20b and esft; device is auto, cpu or gpu; past_ids=false leaves out the
    setting with the ids of past tokens only. jobs measures so many seeds and sets of traces at
    once, each in a process of its own with its share of the cores: the same figures but for the
    times of the fits, which then share a device.
    """

    traces: list[str] = field(default_factory=lambda: list(TRACES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_nets: int = 1
    hidden_dim: int = 1024
    max_tokens: int | None = None
    device: str = "auto"
    past_ids: bool = True
    jobs: int = 1
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


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the numbers that are published."""

    def over_seeds(values: list[float]) -> dict[str, Any]:
        sd = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "sd": sd, "each": values}

    return {
        name: {key: over_seeds([run[name][key] for run in runs]) for key in runs[0][name]}
        for name in ("recall", "gap_closed")
    } | {name: over_seeds([run[name] for run in runs]) for name in ("fit_s", "calibration_error")}


def loaded(name: str) -> TraceList:
    """One set of traces, by the name it is reported under."""
    traces = load_traces(TRACES[name])
    assert isinstance(traces, TraceList)
    return traces


def make_forecaster(args: Args, seed: int) -> Forecaster:
    """The forecaster as it is measured."""
    trainer = {"accelerator": args.device}
    return Forecaster(
        num_nets=args.num_nets, hidden_dim=args.hidden_dim, seed=seed, trainer=trainer
    )


def measure_settings(
    args: Args, name: str, seed: int, num_threads: int
) -> dict[str, dict[str, Any]]:
    """Every setting of one set of traces with one seed; told to standard error as they come."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(num_threads)
    runs = {}
    for setting, traces in settings_of(loaded(name), name, seed, past_ids=args.past_ids).items():
        print(f"seed {seed}: {setting}", file=sys.stderr)
        run = measure(traces, make_forecaster(args, seed), args.max_tokens)
        closed = ", ".join(f"{slots}: {gap:.1%}" for slots, gap in run["gap_closed"].items())
        recall = ", ".join(f"{k}: {share:.1%}" for k, share in run["recall"].items())
        print(f"seed {seed}: {setting}: gap {closed}; recall {recall}", file=sys.stderr)
        runs[setting] = run
    return runs


def measure_all(args: Args) -> dict[str, list[dict[str, Any]]]:
    """The runs of all seeds, by setting."""
    num_threads = max(1, torch.get_num_threads() // args.jobs)
    todo = [(name, seed) for name in args.traces for seed in args.seeds]
    if args.jobs == 1:
        done = [measure_settings(args, *which, num_threads) for which in todo]
    else:  # spawned: a forked process cannot use a GPU that its parent has used
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            started = [pool.submit(measure_settings, args, *which, num_threads) for which in todo]
            done = [future.result() for future in started]
    runs: dict[str, list[dict[str, Any]]] = {}
    for of_settings in done:
        for setting, run in of_settings.items():
            runs.setdefault(setting, []).append(run)
    return runs


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if unknown := set(args.traces) - set(TRACES):
        raise SystemExit(f"traces={sorted(unknown)}: must be among {', '.join(TRACES)}")
    if args.jobs < 1:
        raise SystemExit(f"jobs={args.jobs}: must be at least 1")
    runs = measure_all(args)
    outcome: dict[str, Any] = {
        "seeds": args.seeds,
        "num_nets": args.num_nets,
        "device": _device(args.device),
        "jobs": args.jobs,
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
