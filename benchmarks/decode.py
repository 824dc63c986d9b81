"""Decode speed with a share of the experts on the GPU: ours, and others' ways, side by side.

    python -m benchmarks.decode shape=gptoss20b                       # 25, 40, 50 and 75 % resident
    python -m benchmarks.decode shape=dsv2lite residencies=.4 policies=lru,lfru
    python -m benchmarks.decode shape=live model=DIR device=cuda      # a trained model, end to end
    TRITON_INTERPRET=1 python -m benchmarks.decode small=true tokens=4 repeats=1   # on a CPU

Testbed *replay* (`benchmarks.replay_testbed`): real-size random weights, routing forced from a
real trace, batch 1. Testbed *live* (`benchmarks.live_testbed`): a trained model through `attach`.

All rows of a residency run in one process, taking turns: each repeat lets every row decode the same
tokens of the trace from the same warm cache. The warm-up lets the tokens before pass through the
cache without computing, then puts the residents where they belong; its time is not counted. The
host waits for the device after each token, as a server that streams does.

What is written after each residency is whole, so that a run that is cut leaves what it measured.
Ends with one line of JSON; ``out=benchmarks/results/decode_<shape>.json`` keeps it.
"""

import functools
import gc
import resource
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from safetensors.torch import load_file

from benchmarks import live_testbed
from benchmarks.decode_report import summary, text_table
from benchmarks.decode_rows import Row, StockRow
from benchmarks.decode_timer import Timer
from benchmarks.forced_routing import traces_of_shape
from benchmarks.graph_rows import OwnRow
from benchmarks.link_rates import link_rates
from benchmarks.offload_baselines import ACCELERATE_INSTALLED, AccelerateOffload, HostSyncLru
from benchmarks.options import as_json, parse_options
from benchmarks.record import circumstances, record
from benchmarks.replay_shapes import SHAPES, Shape
from benchmarks.replay_testbed import ReplayTestbed, filled_store
from data.errors import MoecastError
from data.files import write_json
from data.machine import hardware
from predictors.fit.next_layers import fit_next_layers
from predictors.forecaster import Forecaster
from runtime.budget import slots_at
from runtime.compiled_layers import CompiledLayers
from runtime.prefetch.options import PrefetchOptions

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def check_names(*, shape: str, dtype: str, shapes: Collection[str] = SHAPES) -> None:
    """See that both are known.

    Raises:
        ValueError: One is not; says which there are.
    """
    if shape not in shapes:
        raise ValueError(f"shape={shape}: must be one of {', '.join(shapes)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        shape: One of `SHAPES`, or live.
        residencies: Shares of the experts that have a slot.
        policies: Of our cache. In caches of their own for each layer, least_stale is lru by its
            definition unless something is prefetched; belady is told the truth.
        forecaster: Fit one on topics that are not replayed, where the trace has such, and let it
            say what to keep.
        forecaster_state: One that was fitted before by this benchmark's rules, on some other
            machine: its artifact's state.safetensors.
        cpu_lane: Time lfru and the forecaster with the CPU lane, too.
        prefetch: Let the forecaster prefetch, too.
        prefetch_bounds: Time what a perfect prediction of the next layer would be worth.
        prefetch_parts: Time prefetching without what makes it better, too: by forecasts of a token
            as a whole, and of the next layer alone.
        into_slots: Prefetch into slots, not beside them (`PrefetchOptions.into`).
        layers_ahead: How many layers ahead; 0 takes the default of where they go.
        repeats: How often each row is timed.
        tokens: Timed tokens of a repeat.
        warm: Tokens before them that fill the cache; 0 takes the shape's own number.
        batch: Rows that decode together, each a part of the trace of its own.
        accelerate: Time accelerate's offloading, a token a repeat.
        stock: Time transformers' own experts, all resident.
        compile: Time torch.compile on them too, which takes minutes to compile.
        compile_layers: On a GPU, compile what lies between the experts of our rows, and time the
            resident row without it, too.
        small: 2 layers of 8 small experts with drawn routing, for a CPU.
        model: For live: tiny_moe or a folder.
        device: auto, cpu or cuda.
        dtype: Of all weights.
        out: Keep the JSON here; "" does not.
    """

    shape: str = "gptoss20b"
    residencies: tuple[float, ...] = (0.25, 0.4, 0.5, 0.75)
    policies: tuple[str, ...] = ("lru", "lfu", "lfru", "lcp", "belady")
    forecaster: bool = True
    forecaster_state: str = ""
    cpu_lane: bool = False
    prefetch: bool = True
    prefetch_bounds: bool = True
    prefetch_parts: bool = False
    into_slots: bool = False
    layers_ahead: int = 0
    repeats: int = 5
    tokens: int = 64
    warm: int = 0
    batch: int = 1
    accelerate: bool = True
    stock: bool = True
    compile: bool = False
    compile_layers: bool = True
    small: bool = False
    model: str = "tiny_moe"
    device: str = "auto"
    dtype: str = "bfloat16"
    out: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        check_names(shape=self.shape, dtype=self.dtype, shapes=(*SHAPES, "live"))
        if self.layers_ahead < 0:
            raise ValueError(f"layers_ahead={self.layers_ahead}: must not be negative")
        for name in ("repeats", "tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.residencies or not all(0 < share < 1 for share in self.residencies):
            raise ValueError(f"residencies={self.residencies}: must be shares in (0, 1)")


def measure_replay(options: Options, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure all rows on the replay testbed; ``keep`` gets what is there after each residency."""
    device = pick_device(options.device)
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("device=cpu: set TRITON_INTERPRET=1, the kernels' only way to run there")
    shape = SHAPES[options.shape]
    shape = shape.small() if options.small else shape
    bed = ReplayTestbed(
        shape,
        warm=options.warm,
        batch=options.batch,
        device=device,
        num_tokens=options.tokens,
        dtype=DTYPES[options.dtype],
    )
    timer = Timer(bed, repeats=options.repeats, tokens=options.tokens)
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    if not store.is_pinned:
        raise MemoryError("the experts' host memory could not be page-locked: raise ulimit -l")
    timer.say(f"{bed.describe()} is ready")
    rates = link_rates(store.records_LEP[0], bed.block_EP)  # it holds the same bytes
    link_bytes_per_s = max(rate["median"] for rate in rates.values())
    for way, rate in rates.items():
        timer.say(f"link, {way}: {rate['median'] / 1e9:.1f} GB/s")

    forecaster, fit_s = None, None
    if options.forecaster and shape.held_out:
        started_s = time.perf_counter()
        forecaster = fitted_forecaster(shape, options.forecaster_state)
        fit_s = None if options.forecaster_state else time.perf_counter() - started_s
        timer.say("forecaster is ready" + (f", fitted in {fit_s:.0f} s" if fit_s else ""))
    with_compiler = options.compile_layers and device.type == "cuda"
    compiled = CompiledLayers(bed.model) if with_compiler else None
    own_row = functools.partial(OwnRow, bed, store, compiled=compiled)
    resident = own_row("lru", slots=bed.num_experts)
    first_rows: list[Row] = [
        resident,
        OwnRow(bed, store, "lru", slots=bed.num_experts, graph=False, same_bits=compiled is None),
    ]
    if compiled is not None:
        first_rows.append(OwnRow(bed, store, "lru", slots=bed.num_experts, same_bits=False))
    skipped = {}
    if options.stock:
        first_rows += [StockRow(bed, name) for name in ("eager", "grouped_mm")]
    if options.compile:
        first_rows.append(StockRow(bed, "grouped_mm", compiled=True))
    else:
        skipped["torch.compile"] = "compiling takes minutes: compile=true"
    if not options.accelerate:
        skipped["accelerate cpu_offload"] = "accelerate=false"
    elif not ACCELERATE_INSTALLED:
        skipped["accelerate cpu_offload"] = "accelerate is not installed"
    ahead = dict.fromkeys(("layers_ahead", "landing_layers"), options.layers_ahead)
    prefetch = PrefetchOptions(
        **(ahead if options.layers_ahead else {}),
        into="slots" if options.into_slots else "landing",
        # A CPU only stands in: let a window take any expert whole.
        window_s=150e-6 if device.type == "cuda" else 2.0,
        link_bytes_per_s=link_bytes_per_s if device.type == "cuda" else bed.layout.record_bytes,
    )
    result: dict[str, Any] = {
        "testbed": "replay",
        "options": as_json(options),
        "model": bed.describe(),
        "trace": {"name": shape.trace, "digest": bed.routes[0].digest, "start": shape.start},
        "warm_tokens": bed.warm,
        "context_tokens": bed.context_tokens,
        "expert_bytes": bed.layout.record_bytes,
        "hardware": hardware(),
        "link_bytes_per_s": rates,
        "forecaster_fit_s": fit_s,
        "skipped": skipped,
        "failed": timer.failed,
        "rows": [],
        "complete": False,
    }

    def measure(rows: Sequence[Row], residency: float) -> None:
        samples = timer.time(rows)
        if resident.name not in samples:
            raise RuntimeError(f"{resident.name}: {timer.failed[resident.name]}")
        resident_step_s = samples[resident.name].mean_step_s
        told = [
            summary(
                row.name,
                row.slots,
                samples[row.name],
                resident_step_s=resident_step_s,
                link_bytes_per_s=link_bytes_per_s,
                cpu_bytes_per_s=row.cpu_bytes_per_s,
            )
            | {"residency": residency}
            for row in rows
            if row.name in samples
        ]
        result["rows"] += told
        result["peak_host_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for row in rows:
            if row is not resident:
                row.close()
        gc.collect()
        timer.say(f"{residency:.0%} resident\n{text_table(told)}")
        keep(result)

    measure(first_rows, 1.0)
    for residency in options.residencies:
        slots = slots_at(residency, bed.spec)
        rows: list[Row] = [resident, HostSyncLru(bed, slots=slots, records_LEP=store.records_LEP)]
        if options.accelerate and ACCELERATE_INSTALLED:
            rows.append(AccelerateOffload(bed, slots=slots))
        rows += [own_row(policy, slots=slots) for policy in options.policies]
        if forecaster is not None:
            rows.append(own_row("forecast", slots=slots, predictor=forecaster))
        if options.cpu_lane:
            rows.append(own_row("lfru", slots=slots, cpu_lane=True))
            if forecaster is not None:
                rows.append(own_row("forecast", slots=slots, predictor=forecaster, cpu_lane=True))
        if options.prefetch and forecaster is not None:
            fetching = functools.partial(own_row, "forecast", slots=slots, predictor=forecaster)
            rows.append(fetching(prefetch_by="predictor", prefetch=prefetch))
            if options.prefetch_parts:
                rows.append(fetching(prefetch_by="token", prefetch=prefetch))
                nearest = replace(prefetch, layers_ahead=1, landing_layers=1)
                rows.append(fetching(prefetch_by="predictor", prefetch=nearest))
        if options.prefetch_bounds:
            knowing = functools.partial(own_row, slots=slots, prefetch_by="truth")
            rows.append(knowing("lru", prefetch=prefetch))
            if forecaster is not None:
                rows.append(knowing("forecast", predictor=forecaster, prefetch=prefetch))
        measure(rows, residency)
    store.close()
    result["complete"] = True
    return result


def fitted_forecaster(shape: Shape, state: str = "") -> Forecaster:
    """Fitted on the requests whose topics are not replayed; a GPU takes half a minute for it.

    Args:
        shape: Whose trace.
        state: Where it has been saved, if it was fitted before.
    """
    forecaster = Forecaster(seed=0, trainer={"enable_progress_bar": False})
    traces = traces_of_shape(shape)
    if state:
        forecaster.load_state(traces.spec, load_file(state))
        if forecaster.next_layers is None:  # fitted before forecasters had any
            device = pick_device("auto")
            for net in forecaster.nets:
                net.to(device)
            forecaster.next_layers = fit_next_layers(forecaster, traces, device=device)
            for net in forecaster.nets:
                net.cpu()
        return forecaster
    with torch.enable_grad():
        forecaster.fit(traces)
    return forecaster


def pick_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, argv)
        out = Path(options.out) if options.out else None
        name = f"decode_{options.shape}"

        def keep(result: dict[str, Any]) -> None:
            if out is not None:
                write_json(out, {**result, "benchmark": name, "circumstances": circumstances()})

        if options.shape == "live":
            result = live_testbed.measure_live(
                options.model,
                device=pick_device(options.device),
                dtype=options.dtype,
                residencies=options.residencies,
                policies=[p for p in options.policies if p != "belady"],
                repeats=options.repeats,
                tokens=options.tokens,
            )
            result["options"] = as_json(options)
        else:
            result = measure_replay(options, keep)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    record(name, result, out=out)
    wrong = [row["row"] for row in result["rows"] if row["exact"] is False or not row["finite"]]
    if failed := result.get("failed"):
        sys.exit(f"error: these rows failed: {failed}")
    if wrong:
        sys.exit(f"error: logits differ from the resident model's, or are not finite: {wrong}")


if __name__ == "__main__":
    main(sys.argv[1:])
