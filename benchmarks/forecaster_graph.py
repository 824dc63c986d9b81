"""What the forecaster costs inside a decode step's CUDA graph, its kernel against torch.

    python -m benchmarks.forecaster_graph                            # one GPU, under a minute
    python -m benchmarks.forecaster_graph batch_sizes=1,8,32 num_nets=3
    TRITON_INTERPRET=1 python -m benchmarks.forecaster_graph small=true   # any machine: no times

Shapes of real models, networks of drawn weights (what they say does not change what it takes).
Microseconds of a token, each a replay of a captured graph:

- ``answers``: every layer's `on_routed`, one after another; the weights that it reads lie in the
  GPU's cache, as nothing comes in between.
- ``answers, cold``: the same with more memory written before each layer than the cache holds, as
  computing experts does, less the time of the writing alone.
- ``token``: `on_token`, after layers that have shown their routing.
- ``launches``: as many trivial operations as there are layers: what a graph asks for at least.

Before it is timed, the kernel must say what torch says. Ends with one JSON line;
``out=benchmarks/results/forecaster_graph.json`` keeps it.

Shape letters: B rows of a batch · L MoE layers · E experts per layer · K experts per token.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from data.tables import format_table
from predictors.calibrate import Calibration
from predictors.forecaster_graph import ForecasterGraph
from predictors.forecaster_net import ForecasterNet

SHAPES = {"gpt-oss-20b": (24, 32, 4), "qwen3-30b-a3b": (48, 128, 8)}  # L, E, K
SMALL_SHAPE = (2, 12, 3)
DISCOUNTS = (0.7, 0.9, 0.96)  # these and the networks' sizes are `Forecaster`'s defaults
NUM_TOKENS = 8192
FLUSHED_BYTES = 128 << 20  # more than any GPU's L2
REPLAYS = 20
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time.

    Args:
        shapes: Names of `SHAPES`.
        batch_sizes: B, one after another.
        num_nets: Networks that are averaged.
        repeats: Timings of each case, each of `REPLAYS` replays.
        small: 2 layers of 12 experts and a narrow network instead.
        device: "auto", "cuda" or "cpu".
        out: Where to keep the result.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    batch_sizes: tuple[int, ...] = (1, 8)
    num_nets: int = 1
    repeats: int = 7
    small: bool = False
    device: str = "auto"
    out: str = ""

    def __post_init__(self) -> None:
        """ValueError for what cannot be timed."""
        if unknown := set(self.shapes) - set(SHAPES):
            raise ValueError(f"shapes={sorted(unknown)}: must be among {', '.join(SHAPES)}")
        if min(*self.batch_sizes, self.num_nets, self.repeats) < 1:
            raise ValueError("batch_sizes, num_nets and repeats must be at least 1")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"device={self.device}: must be auto, cuda or cpu")


class Bed:
    """A forecaster of drawn weights in the middle of a request, and a token's routing."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        batch_size: int,
        num_nets: int,
        kernels: bool,
        small: bool,
        device: torch.device,
    ) -> None:
        (L, E, K), B = shape, batch_size
        torch.manual_seed(0)
        sizes = {"hidden_dim": 16, "token_dim": 4, "carry_dim": 16} if small else {}
        nets = []
        for _ in range(num_nets):
            net = ForecasterNet(
                num_layers=L,
                num_experts=E,
                num_tokens=NUM_TOKENS,
                num_discounts=len(DISCOUNTS),
                **sizes,
            ).eval()
            for name, weight in net.named_parameters():
                if name.startswith(("take", "own", "mix")):  # they start at 0
                    torch.nn.init.normal_(weight, std=0.02)
            nets.append(net)
        self.graph = ForecasterGraph(
            nets=nets,
            popularity_LE=torch.full((L, E), K / E),
            token_ids_V=torch.arange(NUM_TOKENS),
            discounts=DISCOUNTS,
            calibration=Calibration.identity(),
            top_k=K,
            batch_size=B,
            kernels=kernels,
        ).to(device)
        routed_LBK = torch.rand(L, B, E).softmax(-1).topk(K)
        self.probs_LBK, self.ids_LBK = (part.to(device) for part in routed_LBK)
        self.tokens_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.keep_LE = torch.full((L, E), torch.nan, device=device)
        flushed_bytes = FLUSHED_BYTES if device.type == "cuda" else 0
        self.flushed_N = torch.empty(flushed_bytes, dtype=torch.uint8, device=device)
        self.graph.begin()
        self.graph.on_token(torch.rand(B, L, E, device=device), self.tokens_B, self.tokens_B)

    def answers(self) -> None:
        """Every layer in turn, into the rows that a cache would read."""
        for layer in range(len(self.keep_LE)):
            self._answer(layer)

    def token(self) -> None:
        """What follows the last layer."""
        self.graph.on_token(None, self.tokens_B, self.tokens_B)

    def cold_answers(self) -> None:
        """Every layer in turn, with nothing left in the cache of what it reads."""
        for layer in range(len(self.keep_LE)):
            self.flushed_N.zero_()
            self._answer(layer)

    def flushes(self) -> None:
        """The writing in `cold_answers` alone."""
        for _ in range(len(self.keep_LE)):
            self.flushed_N.zero_()

    def launches(self) -> None:
        """As many trivial operations as there are layers."""
        for keep_E in self.keep_LE:
            keep_E.zero_()

    def _answer(self, layer: int) -> None:
        ids_BK, probs_BK = self.ids_LBK[layer], self.probs_LBK[layer]
        self.graph.on_routed(layer, ids_BK, probs_BK, self.keep_LE[layer])


def times_us(run: Callable[[], None], repeats: int) -> list[float]:
    """Microseconds of one replay of a graph of ``run``."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles kernels and makes handles before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    spent_us = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        spent_us.append(start.elapsed_time(stop) / REPLAYS * 1000)
    return spent_us


def timed(bed: Bed, repeats: int) -> dict[str, dict[str, float]]:
    """All of the module's measurements."""
    flushes_us = spread(times_us(bed.flushes, repeats))["median"]
    return {
        "answers": spread(times_us(bed.answers, repeats)),
        "answers, cold": spread(
            [spent_us - flushes_us for spent_us in times_us(bed.cold_answers, repeats)]
        ),
        "token": spread(times_us(bed.token, repeats)),
        "launches": spread(times_us(bed.launches, repeats)),
    }


def main(argv: Sequence[str]) -> None:
    """Measure, print a table and the JSON line."""
    options = parse_options(Options, argv)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu")
        if options.device == "auto"
        else options.device
    )
    cases: list[dict[str, Any]] = []
    for name in options.shapes:
        shape = SMALL_SHAPE if options.small else SHAPES[name]
        for batch_size in options.batch_sizes:
            said = {}
            for how in ("kernels", "torch"):
                bed = Bed(
                    shape,
                    batch_size=batch_size,
                    num_nets=options.num_nets,
                    kernels=how == "kernels",
                    small=options.small,
                    device=device,
                )
                bed.answers()
                said[how] = bed.keep_LE.clone()
                case: dict[str, Any] = {"shape": name, "batch_size": batch_size, "how": how}
                if device.type == "cuda":  # the interpreter's times mean nothing
                    case["us_per_token"] = timed(bed, options.repeats)
                cases.append(case)
                del bed
            error = float((said["kernels"] - said["torch"]).abs().max())
            if not error < TOLERANCE:
                raise SystemExit(f"{name}, {batch_size} rows: the kernel is off by {error}")
            cases[-2]["max_error"] = error
    print(_table(cases))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreted"
    values = {"device": where, "options": as_json(options), "cases": cases}
    record("forecaster_graph", values, out=Path(options.out) if options.out else None)


def _table(cases: Sequence[dict[str, Any]]) -> str:
    measures = list(cases[0].get("us_per_token", {}))
    rows = [
        [
            f"{case['shape']}, B={case['batch_size']}, {case['how']}",
            *(f"{case['us_per_token'][measure]['median']:.0f}" for measure in measures),
        ]
        for case in cases
    ]
    return format_table(["us of a token", *measures], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
