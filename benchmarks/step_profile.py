"""Where a decode step's time goes: the kernels of one replayed graph, counted and timed.

    python -m benchmarks.step_profile shape=gptoss20b                 # every expert resident
    python -m benchmarks.step_profile shape=qwen3_30b compiled=true   # layers compiled
    TRITON_INTERPRET=1 python -m benchmarks.step_profile small=true   # on a CPU: operators instead

The same testbed and row as `benchmarks.decode`. Ends with one line of JSON.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.decode import DTYPES, pick_device
from benchmarks.graph_rows import OwnRow
from benchmarks.options import as_json, parse_options
from benchmarks.record import record
from benchmarks.replay_shapes import SHAPES
from benchmarks.replay_testbed import ReplayTestbed, filled_store
from data.machine import hardware
from data.tables import format_table
from runtime.budget import slots_at
from runtime.compiled_layers import CompiledLayers

_PROFILED_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is profiled.

    Attributes:
        shape: One of `SHAPES`.
        residency: Share of the experts that have a slot; 1 = all.
        policy: Of the cache.
        compiled: Compile the decoder layers (`runtime.compiled_layers`).
        steps: Timed without the profiler.
        top: Kernels shown; the rest is summed.
        small: As in `benchmarks.decode`.
        device: auto, cpu or cuda.
        dtype: Of all weights.
        out: Keep the JSON here; "" does not.
    """

    shape: str = "gptoss20b"
    residency: float = 1.0
    policy: str = "lru"
    compiled: bool = False
    steps: int = 20
    top: int = 40
    small: bool = False
    device: str = "auto"
    dtype: str = "bfloat16"
    out: str = ""


def profile(options: Options) -> dict[str, Any]:
    """Time the step, then profile it."""
    shape = SHAPES[options.shape]
    shape = shape.small() if options.small else shape
    device = pick_device(options.device)
    bed = ReplayTestbed(
        shape,
        device=device,
        num_tokens=options.steps + 2 * _PROFILED_STEPS,
        dtype=DTYPES[options.dtype],
    )
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    slots = slots_at(options.residency, bed.spec)
    compiled = CompiledLayers(bed.model) if options.compiled else None
    row = OwnRow(bed, store, options.policy, slots=slots, compiled=compiled)
    started_s = time.perf_counter()
    row.prepare()
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _nothing
    wait()
    prepare_s = time.perf_counter() - started_s
    steps_s = []
    for _ in range(options.steps):
        started_s = time.perf_counter()
        row.step()
        wait()
        steps_s.append(time.perf_counter() - started_s)
    with torch.profiler.profile() as profiler:
        for _ in range(_PROFILED_STEPS):
            row.step()
        wait()
    kind = device.type.upper()
    count: dict[str, float] = defaultdict(float)
    spent_us: dict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        if event.device_type.name == kind:
            count[event.name] += 1 / _PROFILED_STEPS
            spent = event.self_device_time_total if kind == "CUDA" else event.self_cpu_time_total
            spent_us[event.name] += spent / _PROFILED_STEPS
    kernels = [
        {"kernel": name, "count": count[name], "us": spent_us[name]}
        for name in sorted(spent_us, key=lambda name: -spent_us[name])
    ]
    return {
        "options": as_json(options),
        "model": bed.describe(),
        "hardware": hardware(),
        "slots": slots,
        "prepare_s": prepare_s,
        "step_p50_s": median(steps_s),
        "kernels_per_step": sum(count.values()),
        "busy_us_per_step": sum(spent_us.values()),
        "kernels": kernels[: options.top],
    }


def _nothing() -> None:
    """A CPU is always done."""


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, argv)
        result = profile(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    rows = [[k["kernel"][:70], f"{k['count']:.0f}", f"{k['us']:.0f}"] for k in result["kernels"]]
    print(format_table(["kernel", "a step", "us a step"], rows))
    print(
        f"{result['model']}: {1e3 * result['step_p50_s']:.2f} ms a step, "
        f"{result['kernels_per_step']:.0f} kernels, {result['busy_us_per_step']:.0f} us busy"
    )
    record(f"step_profile_{options.shape}", result, out=Path(options.out) if options.out else None)


if __name__ == "__main__":
    main(sys.argv[1:])
