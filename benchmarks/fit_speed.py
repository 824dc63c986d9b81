"""How long the forecaster's fit takes on all recorded tokens, and where that time goes.

    python -m benchmarks.fit_speed                    # on a GPU, if there is one
    python -m benchmarks.fit_speed device=cpu repeats=1

All 98,777 tokens of gpt-oss-20b (folder MOECAST_DATA) are fitted. None would be left to calibrate
on, so the requests that one split calls "val" are shown again under other names: only time is
measured here, and what was fitted is not judged. The first of the repeats pays for the start of the
device, and that each fit with one seed gives the same weights, bit for bit, is checked.

Ends with one JSON line; ``out=benchmarks/results/fit_speed.json`` keeps it.
"""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from data.cli import parse_cli
from data.importers import load_traces
from data.schema import Split, TraceList
from data.splits import split_by_topic
from data.tables import format_table
from predictors.forecaster import Forecaster

PARTS = ("features", "training", "calibration", "next_layers", "rule")


@dataclass
class Args:
    """Time the fit; device is auto, cpu or gpu."""

    device: str = "auto"
    num_nets: int = 1
    hidden_dim: int = 1024
    repeats: int = 2
    out: Path | None = None


def everything_to_fit(traces: TraceList, seed: int = 0) -> TraceList:
    """Every request to fit on, and those of the split "val" once more to calibrate on."""
    drawn = split_by_topic({t.request_id: t.topic for t in traces.traces}, seed=seed)
    again = [
        dataclasses.replace(trace, request_id=f"{trace.request_id} again")
        for trace in traces.traces
        if drawn[trace.request_id] == "val"
    ]
    split: dict[str, Split] = {trace.request_id: "fit" for trace in traces.traces}
    split |= {trace.request_id: "val" for trace in again}
    return dataclasses.replace(traces, traces=[*traces.traces, *again], split=split)


def time_fits(
    traces: TraceList, make: Callable[[], Forecaster], repeats: int = 1
) -> tuple[Forecaster, dict[str, Any]]:
    """Fit on all tokens, more than once.

    Returns:
        What was fitted, and the seconds of each fit, in all and by part.

    Raises:
        RuntimeError: Two fits differ.
    """
    everything = everything_to_fit(traces)
    fits: list[dict[str, float]] = []
    fitted: Forecaster | None = None
    for _ in range(repeats):
        before, fitted = fitted, make()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start_s = time.perf_counter()
        report = fitted.fit(everything)
        fits.append(
            {"fit_s": time.perf_counter() - start_s}
            | {f"{part}_s": report.details[f"{part}_s"] for part in PARTS}
        )
        if before is not None:
            same = before.tensors()
            if not all(torch.equal(same[n], tensor) for n, tensor in fitted.tensors().items()):
                raise RuntimeError("two fits with one seed on one device differ")
    assert fitted is not None, f"repeats={repeats}: must be at least 1"
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    return fitted, {
        "fit_all_s": fits[-1]["fit_s"],
        "num_all_tokens": sum(trace.num_tokens for trace in traces.traces),
        "num_calibration_tokens": report.details["val_num_tokens"],
        "fits": fits,
        "same_weights_each_time": repeats > 1 or None,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    if args.repeats < 1:
        raise SystemExit(f"repeats={args.repeats}: must be at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    traces = load_traces("gptoss20b")
    assert isinstance(traces, TraceList)

    def make() -> Forecaster:
        trainer = {"accelerator": args.device, "enable_progress_bar": False}
        return Forecaster(num_nets=args.num_nets, hidden_dim=args.hidden_dim, trainer=trainer)

    _, timed = time_fits(traces, make, args.repeats)
    rows = [
        [str(n), *(f"{fit[f'{part}_s']:.1f}" for part in PARTS), f"{fit['fit_s']:.1f}"]
        for n, fit in enumerate(timed["fits"], start=1)
    ]
    print(format_table(["fit", *(f"{part} s" for part in PARTS), "all s"], rows))
    device = f"CPU, {torch.get_num_threads()} threads"
    if timed["peak_gpu_bytes"]:
        device = torch.cuda.get_device_name()
    record("fit_speed", {"device": device, "num_nets": args.num_nets, **timed}, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
