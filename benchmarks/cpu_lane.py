"""What the CPU lane has to offer on this machine: its rates alone and beside a busy link.

    python -m benchmarks.cpu_lane                         # half a minute on a GPU
    python -m benchmarks.cpu_lane shapes=small            # on a CPU: no link, no round trip

Experts of real models in bfloat16, one token. For each number of threads: GB/s of weights that the
lane's threads compute with, from their host's side, while the link is idle and while threads of the
GPU copy records over it; what the link has left then; and oneDNN on the same records, neuron-major
as they lie, and repacked. ``round trip``: from a kernel in a graph, that asks for 64 neurons, to
the kernel that has seen the answer, without the time of computing them. Ends with a line of JSON.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from benchmarks.replay_testbed import filled_store
from data.machine import hardware
from data.tables import format_table
from runtime.cpu_lane import CpuLane
from runtime.device_cache import Active
from runtime.expert_layout import ExpertLayout
from runtime.kernels.activation import Activation
from runtime.kernels.copy import copy_records
from runtime.kernels.lane import LaneEvent, LaneRates, await_answer, post_request
from runtime.pinned_store import PinnedStore

SHAPES = {"gptoss20b": (2880, 2880, 24), "qwen3_30b": (2048, 768, 96), "small": (64, 192, 6)}
K = 4
_COPIES = 120  # of records in a graph that keeps the link busy
_ROUND_TRIPS = 24  # in a graph
_ASKED = 64  # neurons of a round trip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        shapes: Of experts.
        threads: How many; 0 stands for the lane's own choice.
        seconds: Of each measurement on the host.
        repeats: Of each.
        out: Keep the JSON here; "" does not.
    """

    shapes: tuple[str, ...] = ("gptoss20b", "qwen3_30b")
    threads: tuple[int, ...] = (0, 8, 4)
    seconds: float = 0.2
    repeats: int = 3
    out: str = ""


class Bed:
    """Records in host memory, a lane on them, and something for the link to do."""

    def __init__(self, shape: str, device: torch.device) -> None:
        D, neurons, self.E = SHAPES[shape]
        self.layout = ExpertLayout(
            hidden_size=D,
            expert_intermediate_size=neurons,
            dtype=torch.bfloat16,
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            is_concatenated=True,
        )
        self.device = device
        self.block_EP = torch.empty(
            self.E, self.layout.record_elements, dtype=torch.bfloat16, device=device
        ).normal_(std=0.02)
        self.store: PinnedStore = filled_store(self.layout, 1, self.block_EP)

    def lane(self, num_threads: int) -> CpuLane:
        """So many threads; 0 = its own choice."""
        lane = CpuLane(
            layout=self.layout,
            home_address_LE=self.store.address_LE,
            activations=[Activation("silu")],
            top_k=K,
            max_tokens=1,
            device=self.device,
            num_threads=num_threads or None,
        )
        lane.mailbox.hidden_TD.normal_()
        return lane

    def rate(self, compute: Callable[[int], None], go_on: Callable[[float], bool]) -> float:
        """GB/s of whole experts, one after the other."""
        compute(0)
        started_s, done = time.perf_counter(), 0
        while go_on(time.perf_counter() - started_s):
            compute(done % self.E)
            done += 1
        return done * self.layout.record_bytes / (time.perf_counter() - started_s) / 1e9

    def busy_link(self) -> Any:
        """A graph that keeps it busy for about a tenth of a second."""
        addresses_E = self.store.address_LE[0].to(self.device)
        target_E = torch.tensor([record.data_ptr() for record in self.block_EP])
        target_E = target_E.to(self.device)
        num_bytes_1 = torch.full((1,), self.layout.record_bytes, device=self.device)

        def copies() -> None:
            for n in range(_COPIES):
                e = n % self.E
                copy_records(addresses_E[e : e + 1], target_E[e : e + 1], num_bytes_1)

        return captured(copies)


def captured(run: Callable[[], None]) -> Any:
    """``run`` as a graph, after a trial."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def events() -> tuple[Any, Any]:
    """Where a time on the device begins and ends."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return begin, end


def goes_on(end: Any, _: float) -> bool:
    """Whether the device has not come to ``end`` yet."""
    return not end.query()


def measure_threads(bed: Bed, lane: CpuLane, options: Options) -> dict[str, Any]:
    """The lane's rate, alone and beside the link."""
    ids_TK = torch.zeros(1, K, dtype=torch.int64)

    def ask(expert: int) -> None:
        lane.ask(0, [(expert, 0)], ids_TK.fill_(expert))

    def alone(spent_s: float) -> bool:
        return spent_s < options.seconds

    result = {"alone": [bed.rate(ask, alone) for _ in range(options.repeats)]}
    if bed.device.type == "cuda":
        graph = bed.busy_link()
        link_bytes = _COPIES * bed.layout.record_bytes
        for name, compute in (("link alone", None), ("beside", ask)):
            rates, link_rates = [], []
            for _ in range(options.repeats):
                begin, end = events()
                begin.record()
                graph.replay()
                end.record()
                if compute is not None:
                    rates.append(bed.rate(compute, functools.partial(goes_on, end)))
                end.synchronize()
                link_rates.append(link_bytes / begin.elapsed_time(end) / 1e6)
            if compute is not None:
                result[name] = rates
                result["link beside"] = link_rates
            else:
                result[name] = link_rates
    return {name: spread(rates) for name, rates in result.items()}


def measure_onednn(bed: Bed, num_threads: int, options: Options) -> dict[str, Any]:
    """Products of torch on the same bytes."""
    D, neurons = bed.layout.hidden_size, bed.layout.expert_intermediate_size
    x_TD = torch.randn(1, D).bfloat16()

    def neuron_major(expert: int) -> None:
        block_FRD = bed.layout.block_FRD(bed.store.record_P(0, expert))
        inner_TF = F.silu(F.linear(x_TD, block_FRD[:, 0])) * F.linear(x_TD, block_FRD[:, 1])
        F.linear(inner_TF, block_FRD[:, 2].T)

    def repacked(expert: int) -> None:
        block_P = bed.layout.block_FRD(bed.store.record_P(0, expert)).reshape(-1)
        up, down = block_P[: 2 * neurons * D], block_P[2 * neurons * D :]
        gate_TF, up_TF = F.linear(x_TD, up.view(-1, D)).chunk(2, -1)
        F.linear(F.silu(gate_TF) * up_TF, down.view(D, neurons))

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return {
            name: spread(
                [
                    bed.rate(compute, lambda spent_s: spent_s < options.seconds)
                    for _ in range(options.repeats)
                ]
            )
            for name, compute in (("oneDNN", neuron_major), ("oneDNN, repacked", repacked))
        }
    finally:
        torch.set_num_threads(before)


def measure_round_trip_us(bed: Bed, lane: CpuLane, options: Options) -> dict[str, float]:
    """Microseconds on the device, computing deducted."""
    neurons, device = bed.layout.expert_intermediate_size, bed.device
    cpu_ns = 1e9 * lane.measure_neuron_s()
    rates = LaneRates(link_ns=1e9, cpu_ns=cpu_ns, latency_ns=0.0)  # all is the host's
    lane.books.cpu_ns_1.fill_(cpu_ns)
    event = LaneEvent(0, lane.books, lane.mailbox, rates)
    entries = len(lane.mailbox.job_expert_A)

    def table(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        padded = [*values, *[0] * (entries - len(values))]
        return torch.tensor(padded, dtype=dtype, device=device)

    active = Active(table(1)[:1], table(0), table(dtype=torch.int64), table(neurons - _ASKED))
    ids_TK = torch.tensor([[0, *[bed.E] * (K - 1)]], device=device)
    hidden_TD = torch.randn(1, bed.layout.hidden_size, device=device).bfloat16()
    home_E = bed.store.address_LE[0].to(device)
    present_E = torch.zeros(bed.E, dtype=torch.int32, device=device)

    def trips() -> None:
        for _ in range(_ROUND_TRIPS):
            post_request(
                event,
                hidden_TD=hidden_TD,
                topk_expert_ids_TK=ids_TK,
                active=active,
                home_address_E=home_E,
                present_E=present_E,
                slot_neurons=neurons,
                layout=bed.layout,
                fill=False,
            )
            await_answer(event)

    graph = captured(trips)
    trip_us = []
    for _ in range(20 * options.repeats):
        begin, end = events()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        trip_us.append(1e3 * begin.elapsed_time(end) / _ROUND_TRIPS - _ASKED * cpu_ns / 1e3)
    counts = lane.counts()
    if counts["unanswered"] or counts["pauses"]:
        raise RuntimeError(f"the lane failed: {counts}")
    return spread(trip_us)


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, argv)
        if unknown := set(options.shapes) - set(SHAPES):
            raise ValueError(f"shapes={sorted(unknown)}: must be of {', '.join(SHAPES)}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        bed = Bed(shape, device)
        for num_threads in options.threads:
            lane = bed.lane(num_threads)
            row: dict[str, Any] = {
                "shape": shape,
                "expert_bytes": bed.layout.record_bytes,
                "threads": lane.num_threads,
                "gb_per_s": measure_threads(bed, lane, options),
            }
            if device.type == "cuda":
                row["round_trip_us"] = measure_round_trip_us(bed, lane, options)
            lane.close()
            row["gb_per_s"] |= measure_onednn(bed, row["threads"], options)
            rows.append(row)
        bed.store.close()
    names = list(rows[0]["gb_per_s"])
    header = ("shape", "threads", *(f"{name} GB/s" for name in names), "round trip us")
    print(
        format_table(
            header,
            [
                [row["shape"], str(row["threads"])]
                + [f"{row['gb_per_s'][name]['median']:.1f}" for name in names]
                + [f"{row['round_trip_us']['median']:.1f}" if "round_trip_us" in row else "-"]
                for row in rows
            ],
        )
    )
    out = Path(options.out) if options.out else None
    result = {"options": as_json(options), "hardware": hardware(), "rows": rows}
    record("cpu_lane", result, out=out)


if __name__ == "__main__":
    main(sys.argv[1:])
