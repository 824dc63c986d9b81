"""How fast experts are computed where they lie, and how fast they travel: one GPU, one minute.

    python -m benchmarks.expert_kernels
    python -m benchmarks.expert_kernels shapes=[gptoss20b] tokens=[1] all_tiles=true

Shapes of real models, random bfloat16 weights, one layer's experts for so many tokens:

- ``resident``: every needed expert lies whole in a slot; GB/s of weights read from GPU memory.
- ``in place``: none does, nothing is kept; GB/s read over the link from pinned host memory.
- ``write-through``: none does, each is put into its slot in passing.
- ``half``: every other one lies in a slot, the rest is written through.
- ``copy``: the copy kernel alone, and the copy engine, for the same experts.

A case is checked against float64 before it is timed: outputs are poisoned first, the relative error
must be below 1e-2. Times are of CUDA graphs of several layers' worth, so that what a cache could
hold is read once. Ends with one JSON line; ``out=benchmarks/results/expert_kernels.json`` keeps it.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record, spread
from data.cli import parse_cli
from data.tables import format_table
from runtime.device_cache import Active
from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import Activation
from runtime.kernels.copy import copy_records
from runtime.kernels.experts import expert_step, expert_step_reference
from runtime.kernels.tiles import (
    DEFAULT_TILES,
    Stream,
    Tiles,
    stream_for,
    workspace_elements,
)

SHAPES = {  # D, F, E, K, biases
    "gptoss20b": (2880, 2880, 32, 4, True),
    "qwen3_30b": (2048, 768, 128, 8, False),
    "dsv2lite": (2048, 1408, 64, 6, False),
    "small": (64, 128, 8, 2, True),
}
TILES = [
    *(Tiles(32, 64, 4, stages) for stages in (3, 5)),
    *(Tiles(32, 128, 4, stages) for stages in (3, 5)),
    *(Tiles(64, 64, 4, stages) for stages in (3, 5)),
]
STREAMS = [
    Stream(neurons, step, num_warps)
    for neurons in (24, 32, 48, 88)
    for step, num_warps in ((1, 4), (1, 8), (2, 8), (2, 16), (4, 8))
]
PLACES = ("resident", "half", "write-through", "in place")
MOST_BYTES = 4 << 30  # of records on each side


@dataclass
class Args:
    """Time the kernels; all_tiles tries every cut of the work instead of the default one."""

    shapes: list[str] = field(default_factory=lambda: ["gptoss20b", "qwen3_30b", "dsv2lite"])
    tokens: list[int] = field(default_factory=lambda: [1, 4, 16, 32])
    places: list[str] = field(default_factory=lambda: list(PLACES))
    all_tiles: bool = False
    repeats: int = 7
    out: Path | None = None


class Bed:
    """Records at home and in slots, and steps that use them in turn."""

    def __init__(self, name: str, num_tokens: int, device: torch.device) -> None:
        D, F, self.E, self.K, has_bias = SHAPES[name]
        self.layout = ExpertLayout(
            hidden_size=D,
            expert_intermediate_size=F,
            dtype=torch.bfloat16,
            has_gate=True,
            has_bias=has_bias,
            is_transposed=False,
            is_concatenated=True,
        )
        self.activation = Activation("clamped", 1.702, 7.0) if has_bias else Activation("silu")
        record_bytes = self.layout.record_bytes
        self.layers = max(1, min(8, MOST_BYTES // (self.E * record_bytes)))
        count = self.layers * self.E
        pinned = device.type == "cuda"
        self.slots_NP = torch.empty(
            count, self.layout.record_elements, dtype=torch.bfloat16, device=device
        ).normal_(std=D**-0.5)
        self.home_NP = torch.empty(
            self.slots_NP.shape, dtype=torch.bfloat16, pin_memory=pinned
        ).copy_(self.slots_NP)
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(num_tokens, self.E, generator=generator)
        self.ids_TK = scores.topk(self.K).indices.to(device)
        self.weights_TK = torch.full(self.ids_TK.shape, 1 / self.K, device=device)
        self.hidden_TD = torch.randn(num_tokens, D, generator=generator).to(device, torch.bfloat16)
        self.output_TD = torch.full_like(self.hidden_TD, torch.nan)
        self.needed = sorted(set(self.ids_TK.flatten().tolist()))
        self.step_bytes = len(self.needed) * record_bytes
        at = torch.arange(count).view(self.layers, self.E) * record_bytes
        self.home_LE = (at + self.home_NP.data_ptr()).to(device)
        self.slot_LE = (at + self.slots_NP.data_ptr()).to(device)
        self.device = device

    def active(self, layer: int, place: str) -> Active:
        """The event's list: what lies in slots, misses first."""
        F = self.layout.expert_intermediate_size
        resident = {
            "resident": self.needed,
            "half": self.needed[::2],
            "write-through": [],
            "in place": [],
        }[place]
        order = [e for e in self.needed if e not in resident] + list(resident)
        slots = [0 if place == "in place" else int(self.slot_LE[layer, e]) for e in order]
        present = [F if e in resident else 0 for e in order]
        return Active(
            torch.tensor([len(order)], dtype=torch.int32, device=self.device),
            torch.tensor(order, dtype=torch.int32, device=self.device),
            torch.tensor(slots, device=self.device),
            torch.tensor(present, dtype=torch.int32, device=self.device),
        )

    def steps(self, place: str, cut: Mapping[str, Any]) -> list[Callable[[], None]]:
        """One step of every layer."""
        size = workspace_elements(
            num_tokens=len(self.ids_TK), top_k=self.K, layout=self.layout, **cut
        )
        workspace = torch.full((size,), torch.nan, device=self.device)

        def step_of(layer: int) -> Callable[[], None]:
            active = self.active(layer, place)
            address_LE = self.home_LE if place == "in place" else self.slot_LE
            return lambda: expert_step(
                hidden_TD=self.hidden_TD,
                topk_expert_ids_TK=self.ids_TK,
                topk_weights_TK=self.weights_TK,
                active=active,
                home_address_E=self.home_LE[layer],
                address_E=address_LE[layer],
                slot_neurons=self.layout.expert_intermediate_size,
                layout=self.layout,
                activation=self.activation,
                workspace=workspace,
                output_TD=self.output_TD,
                write_through=place != "in place",
                **cut,
            )

        return [step_of(layer) for layer in range(self.layers)]

    def error_of(self, step: Callable[[], None]) -> float:
        """Relative error of the first layer's step against float64."""
        self.output_TD.fill_(torch.nan)
        step()
        reference_TD = expert_step_reference(
            hidden_TD=self.hidden_TD,
            topk_expert_ids_TK=self.ids_TK,
            topk_weights_TK=self.weights_TK,
            records_EP=self.slots_NP[: self.E],
            layout=self.layout,
            activation=self.activation,
        )
        error = (self.output_TD.double() - reference_TD).norm() / reference_TD.norm()
        return float(error)


def timed_s(steps: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of one step, each repeat a replay of a graph of all of them."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times_s = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times_s.append(start.elapsed_time(stop) / 1e3 / len(steps))
    return times_s[1:]


def copies(bed: Bed, repeats: int) -> dict[str, dict[str, float]]:
    """GB/s of the same experts' copies, by GPU threads and by the copy engine."""
    rates = {}
    needed = torch.tensor(bed.needed, device=bed.device)
    num_bytes_N = torch.full_like(needed, bed.layout.record_bytes)

    def launch(layer: int, programs: int) -> Callable[[], None]:
        source_N, target_N = bed.home_LE[layer, needed], bed.slot_LE[layer, needed]
        return lambda: copy_records(source_N, target_N, num_bytes_N, programs_per_record=programs)

    for programs in (8, 16, 24, 32):
        times_s = timed_s([launch(layer, programs) for layer in range(bed.layers)], repeats)
        rates[f"copy, {programs} programs"] = spread([bed.step_bytes / s / 1e9 for s in times_s])

    def engine(layer: int) -> Callable[[], None]:
        rows = [layer * bed.E + expert for expert in bed.needed]

        def run() -> None:
            for row in rows:
                bed.slots_NP[row].copy_(bed.home_NP[row], non_blocking=True)

        return run

    times_s = timed_s([engine(layer) for layer in range(bed.layers)], repeats)
    rates["copy engine"] = spread([bed.step_bytes / s / 1e9 for s in times_s])
    return rates


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    args = parse_cli(Args, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases: list[dict[str, Any]] = []
    cells = []
    for name in args.shapes:
        for num_tokens in args.tokens:
            bed = Bed(name, num_tokens, device)
            kind = "stream" if num_tokens == 1 else "tiles"
            tried: Sequence[Stream | Tiles] = [
                stream_for(bed.layout) if num_tokens == 1 else DEFAULT_TILES
            ]
            if args.all_tiles:
                tried = STREAMS if num_tokens == 1 else TILES
            for place in args.places:
                for tiles in tried:
                    steps = bed.steps(place, {kind: tiles})
                    error = bed.error_of(steps[0])
                    assert error < 1e-2, f"{name}, {num_tokens} tokens, {place}, {tiles}: {error}"
                    case: dict[str, Any] = {
                        "shape": name,
                        "tokens": num_tokens,
                        "place": place,
                        "tiles": list(dataclasses.astuple(tiles)),
                        "relative_error": error,
                    }
                    if device.type == "cuda":  # the interpreter's times mean nothing
                        times_s = timed_s(steps, args.repeats)
                        case["gb_per_s"] = spread([bed.step_bytes / s / 1e9 for s in times_s])
                        case["us"] = spread([s * 1e6 for s in times_s])
                    cases.append(case)
                timed = [c for c in cases[-len(tried) :] if "us" in c]
                for case in sorted(timed, key=lambda c: c["us"]["median"])[:3]:
                    us, gb_per_s = case["us"]["median"], case["gb_per_s"]["median"]
                    cells.append(
                        [
                            name,
                            str(num_tokens),
                            place,
                            str(case["tiles"]),
                            f"{us:.0f}",
                            f"{gb_per_s:.1f}",
                        ]
                    )
                    print(*cells[-1], file=sys.stderr)
            if device.type == "cuda" and not args.all_tiles:
                for what, rate in copies(bed, args.repeats).items():
                    cases.append(
                        {"shape": name, "tokens": num_tokens, "place": what, "gb_per_s": rate}
                    )
                    cells.append([name, str(num_tokens), what, "", "", f"{rate['median']:.1f}"])
            del bed
    print(format_table(["shape", "tokens", "where", "tiles", "us", "GB/s"], cells))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreted"
    record("expert_kernels", {"device": where, "cases": cases}, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
