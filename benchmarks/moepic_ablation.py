"""MoEpic's Table 3 from our runtime: what prefetcher, policy and configurator are worth.

    python -m benchmarks.moepic_ablation shape=gptoss20b residency=.4     # a minute and a half
    TRITON_INTERPRET=1 python -m benchmarks.moepic_ablation small=true tokens=4 repeats=1  # a CPU

Testbed *replay* of `benchmarks.decode`, batch 1, all rows taking turns in one process. Every row
has the memory of so many whole experts; where something is prefetched, its buffer of K experts is a
part of that.

Rows: **full** (tops by Algorithm 1, least cache priority, prefetching in the order of a predicted
next layer), **w/o SP** (random experts are prefetched), **w/o LCP** (random replacement), **w/o
CCA** (equal memory and halves: the paper takes both away at once), as the paper has them; beside
them full with the best division by the same model (`allocate_optimally`), without any prefetch, and
with whole experts; then what we serve with: whole experts, LFRU, and the forecaster where it has
been fitted before (``forecaster_state``).

The division reckons with what is measured here (`runtime.split_times`) and with what was counted on
the tokens before those that are replayed, as the paper counts online. A replayed trace has no
hidden states, so router reuse cannot run: what stands for it names K experts of which ``recall``
are right (`benchmarks.guessed_routing`), 0.82 by default, which is what router reuse was measured
to find one layer ahead on a trained model (docs/log.md). It is said of the counted tokens likewise.

At the end the expert kernel runs once on a layer whose tops are cached and notes the device's clock
at the beginning and end of each chunk: are tops computed while bottoms arrive?

Ends with one line of JSON; ``out=`` keeps it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from benchmarks.decode import DTYPES, check_names, fitted_forecaster, pick_device
from benchmarks.decode_report import summary, text_table
from benchmarks.decode_rows import Row
from benchmarks.decode_timer import Timer
from benchmarks.forced_routing import Route
from benchmarks.graph_rows import OwnRow
from benchmarks.guessed_routing import ToldScores, random_scores, recalled_scores
from benchmarks.link_rates import link_rates
from benchmarks.moepic_split import Tokens, count
from benchmarks.options import as_json, parse_options
from benchmarks.overlap import overlap
from benchmarks.record import record
from benchmarks.replay_shapes import SHAPES, Shape
from benchmarks.replay_testbed import ReplayTestbed, filled_store
from data.errors import MoecastError
from data.machine import hardware
from runtime.kernels.activation import Activation
from runtime.prefetch.options import PrefetchOptions
from runtime.slot_split import SlotSplit
from runtime.split_budget import (
    LayerStatistics,
    SplitPlan,
    SplitTimes,
    allocate,
    allocate_optimally,
    stall_of,
)
from runtime.split_times import captured_s, experts_s


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        shape: One of `SHAPES`.
        residency: Share of the experts that memory holds.
        recall: Of what stands for router reuse.
        forecaster_state: As in `benchmarks.decode`; "" leaves that row out.
        counted: Tokens before the replayed ones that are counted.
        repeats: How often each row is timed.
        tokens: Timed tokens of a repeat.
        small: 2 layers of 8 small experts with drawn routing, for a CPU.
        device: auto, cpu or cuda.
        dtype: Of all weights.
        out: Keep the JSON here; "" does not.
    """

    shape: str = "gptoss20b"
    residency: float = 0.4
    recall: float = 0.82
    forecaster_state: str = ""
    counted: int = 1000
    repeats: int = 3
    tokens: int = 64
    small: bool = False
    device: str = "auto"
    dtype: str = "bfloat16"
    out: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        check_names(shape=self.shape, dtype=self.dtype)
        for name in ("repeats", "tokens", "counted"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.residency < 1:
            raise ValueError(f"residency={self.residency}: must be in (0, 1)")


def measure(options: Options) -> dict[str, Any]:
    """Divide memory, time all rows, and look at the clock of one layer."""
    device = pick_device(options.device)
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("device=cpu: set TRITON_INTERPRET=1, the kernels' only way to run there")
    shape = small(SHAPES[options.shape]) if options.small else SHAPES[options.shape]
    bed = ReplayTestbed(
        shape, device=device, num_tokens=options.tokens, dtype=DTYPES[options.dtype]
    )
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    if not store.is_pinned:
        raise MemoryError("the experts' host memory could not be page-locked: raise ulimit -l")
    timer = Timer(bed, repeats=options.repeats, tokens=options.tokens)
    rates = link_rates(store.records_LEP[0], bed.block_EP)
    link_bytes_per_s = max(rate["median"] for rate in rates.values())

    resident = OwnRow(bed, store, "lru", slots=bed.num_experts)
    resident_samples = timer.time([resident])
    if resident.name not in resident_samples:
        raise RuntimeError(f"{resident.name}: {timer.failed[resident.name]}")
    resident_step_s = resident_samples[resident.name].mean_step_s
    times = split_times(bed, store, resident_step_s=resident_step_s, rate=link_bytes_per_s)
    timer.say(f"{times}")
    layers = counted_before(bed, shape, options)
    memory = options.residency * bed.num_layers * bed.num_experts
    buffered = memory - bed.top_k
    plans = {
        "Algorithm 1": allocate(buffered, layers, times),
        "optimal": allocate_optimally(buffered, layers, times, unit=0.5),
        "halves": equal(buffered, layers, times, share=0.5),
        "whole": equal(buffered, layers, times, share=1.0),
    }
    splits = {name: SlotSplit.of_plan(plan, bed.layout) for name, plan in plans.items()}
    for name, split in splits.items():
        timer.say(f"{name}: {split.describe(bed.layout)}")

    ids_NLK = bed.routes[0].ids_NLK
    said = ToldScores(bed, recalled_scores(ids_NLK, bed.num_experts, recall=options.recall))
    guessed = ToldScores(bed, random_scores(len(ids_NLK), bed.num_layers, bed.num_experts))
    prefetch = PrefetchOptions(
        into="beside",
        landing_records=bed.top_k,
        window_s=times.attention_s,
        link_bytes_per_s=link_bytes_per_s,
    )

    def row(name: str, policy: str, split: SlotSplit, source: ToldScores | None = said) -> OwnRow:
        return OwnRow(bed, store, policy, split=split, source=source, prefetch=prefetch, name=name)

    unsplit = SlotSplit.of_plan(equal(memory, layers, times, share=1.0), bed.layout)
    rows: list[Row] = [
        row("full", "lcp", splits["Algorithm 1"]),
        row("w/o SP (random prefetch)", "lcp", splits["Algorithm 1"], guessed),
        row("w/o LCP (random eviction)", "random", splits["Algorithm 1"]),
        row("w/o CCA (equal, halves)", "lcp", splits["halves"]),
        row("full, best division", "lcp", splits["optimal"]),
        row("full, no prefetch", "lcp", splits["Algorithm 1"], None),
        row("full, whole experts", "lcp", splits["whole"]),
        OwnRow(bed, store, "lfru", split=unsplit, name="ours: whole, lfru"),
    ]
    if options.forecaster_state:
        forecaster = fitted_forecaster(shape, options.forecaster_state)
        rows.append(
            OwnRow(
                bed,
                store,
                "forecast",
                split=unsplit,
                predictor=forecaster,
                name="ours: whole, forecaster",
            )
        )
    samples = timer.time(rows)
    told = [
        summary(
            row.name,
            row.slots,
            samples[row.name],
            resident_step_s=resident_step_s,
            link_bytes_per_s=link_bytes_per_s,
        )
        for row in rows
        if row.name in samples
    ]
    for one in told:
        one["relative_tpot"] = one["tpot_mean_s"]["median"] / told[0]["tpot_mean_s"]["median"]
    print(text_table(told), flush=True)
    shown = None
    if device.type == "cuda":
        tops = min(
            splits["Algorithm 1"].neurons[bed.num_layers // 2],
            bed.layout.expert_intermediate_size // 128 * 64,
        )
        shown = overlap(bed, store, slot_neurons=tops)
        timer.say(f"{shown}")
    store.close()
    return {
        "options": as_json(options),
        "model": bed.describe(),
        "trace": {"name": shape.trace, "digest": bed.routes[0].digest, "start": shape.start},
        "hardware": hardware(),
        "link_bytes_per_s": rates,
        "resident_step_s": resident_step_s,
        "times": {name: getattr(times, name) for name in times.__slots__},
        "divisions": {
            name: {
                "expected_stall_s": plans[name].stall_s,
                "slots": split.slots,
                "neurons": split.neurons,
                "num_bytes": split.num_bytes(bed.layout),
            }
            for name, split in splits.items()
        },
        "prefetch_stands_for": f"router reuse, by the truth at recall {options.recall}",
        "rows": told,
        "overlap": shown,
        "failed": timer.failed,
    }


def split_times(
    bed: ReplayTestbed, store: Any, *, resident_step_s: float, rate: float
) -> SplitTimes:
    """Measured on this testbed; attention is what the resident step leaves to it."""
    moe_s = experts_s(
        store,
        activation=Activation.of(bed.layers[0].experts),
        top_k=bed.top_k,
        memory_N=bed.block_EP.view(-1),
    )
    hidden_11D = torch.zeros(
        1, 1, bed.layout.hidden_size, dtype=bed.layout.dtype, device=bed.device
    )
    head_s = captured_s(lambda: bed.model.get_output_embeddings()(hidden_11D), bed.device)
    attention_s = (resident_step_s - head_s) / bed.num_layers - moe_s
    return SplitTimes(
        attention_s=max(0.0, attention_s),
        moe_s=moe_s,
        head_s=head_s,
        load_s=bed.layout.record_bytes / rate,
    )


def counted_before(bed: ReplayTestbed, shape: Shape, options: Options) -> list[LayerStatistics]:
    """The model's statistics of the tokens that come before the replayed ones."""
    sizes = {"num_layers": bed.num_layers, "num_experts": bed.num_experts}
    if shape.trace:
        start = max(0, shape.start - options.counted)
        before = replace(shape, start=start)
        route = Route.recorded(before, shape.start - start, **sizes)
    else:
        route = Route.drawn(options.counted, top_k=bed.top_k, **sizes)
    used_NLE = torch.zeros(len(route.ids_NLK), bed.num_layers, bed.num_experts, dtype=torch.bool)
    used_NLE.scatter_(2, route.ids_NLK, True)
    said_NLE = recalled_scores(route.ids_NLK, bed.num_experts, recall=options.recall, seed=1)
    tokens = Tokens(used_NLE.numpy(), said_NLE.double().numpy())
    return count(tokens, bed.top_k)


def equal(
    memory: float, layers: Sequence[LayerStatistics], times: SplitTimes, *, share: float
) -> SplitPlan:
    """So thick tops of the same number of experts in every layer, one more where memory is left."""
    num_layers, most = len(layers), layers[0].num_experts
    tops = min(int(memory / share + 1e-9), num_layers * most)
    cached_L = np.full(num_layers, tops // num_layers, np.int64)
    cached_L[np.linspace(0, num_layers, tops % num_layers, endpoint=False).astype(np.int64)] += 1
    memory_L = cached_L.astype(np.float64) * share
    return SplitPlan(memory_L, cached_L, stall_of(memory_L, cached_L, layers, times))


def small(shape: Shape) -> Shape:
    """As `Shape.small`, with experts that can be split."""
    shape = shape.small()
    sizes = dict.fromkeys({"intermediate_size", "moe_intermediate_size"} & shape.config.keys(), 192)
    return replace(shape, config={**shape.config, **sizes})


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, argv)
        result = measure(options)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    record("moepic_ablation", result, out=Path(options.out) if options.out else None)
    wrong = [row["row"] for row in result["rows"] if row["exact"] is False or not row["finite"]]
    if result["failed"]:
        sys.exit(f"error: these rows failed: {result['failed']}")
    if wrong:
        sys.exit(f"error: logits differ from the resident model's, or are not finite: {wrong}")


if __name__ == "__main__":
    main(sys.argv[1:])
