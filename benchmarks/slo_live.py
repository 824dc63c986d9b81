"""How many requests keep their objectives on a running engine: ``slo`` against first in, first out.

    python -m benchmarks.slo_live                          # under 6 minutes; let nothing else run
    python -m benchmarks.slo_live loads=1.0 requests=80 repeats=1              # a look

What `benchmarks.slo_scheduling` simulates, by the clock: the embedded model, all experts resident,
one thread, batches of 16 by `runtime.server.generation.GenerationEngine`, as a server has it, with
serve.scheduler=fifo and slo in turns. The requests are that benchmark's, lengths divided by
``shrink`` since the model is small: recorded arrivals scaled to ``load``, two tasks with an
objective each. What steps cost is measured once, before anything is served, and is what load 1 and
the objectives are reckoned from; what simulating the same requests with these costs gives stands
beside each row.

The schedulers see no answer's length: it is expected to be the mean of those that have ended, which
begins as 256 tokens in each run. (A client's bound on it, which a server would see, is not in the
trace: here it is the answer's length, and hidden.) Each repeat is another window of the trace and
other tasks. A request's clock starts when it is submitted, ``late_s`` after its time at most.

Ends with one line of JSON.
"""

import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import slo_scheduling
from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from benchmarks.slo_simulation import Job, simulate
from benchmarks.soak_load import recorded_arrivals
from data.adapters import spec_of
from data.importers.catalog import data_dir
from data.models import load_model
from data.tables import format_table
from runtime.budget import slots_at
from runtime.engine import attach
from runtime.offload import Offload
from runtime.scheduler import MAX_OVERTAKEN, StepCosts
from runtime.server.generation import GenerationEngine
from runtime.server.objectives import AnswerLengths, Objectives, judge
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Generation, GenerationRequest
from runtime.server.slo import SLO

SCHEDULERS = ("fifo", SLO)
_SIMULATED = {"fifo": "fifo", SLO: "slo, mean lengths"}
_PATIENCE_S = 120.0  # for what has begun when the last request has come


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is served.

    Attributes:
        arrivals: A file of the data folder's arrivals, without its endings.
        requests: Of each run.
        loads: See above.
        repeats: Of each load and scheduler.
        max_batch: Sequences that run at once.
        max_overtaken: The scheduler's bound on waiting.
        ttft_slack: As `benchmarks.slo_scheduling`.
        tpot_slack: The same.
        shrink: What recorded lengths are divided by.
        residency: Share of the experts that have a slot (policy lfru).
        out: Where to keep the result, or "".
    """

    arrivals: str = "azure_llm_2023_conv"
    requests: int = 200
    loads: tuple[float, ...] = (0.8, 1.0, 1.2)
    repeats: int = 5
    max_batch: int = 16
    max_overtaken: int = MAX_OVERTAKEN
    ttft_slack: tuple[float, ...] = (5.0, 50.0)
    tpot_slack: tuple[float, ...] = (1.5, 4.0)
    shrink: int = 8
    residency: float = 1.0
    out: str = ""

    def simulated(self, costs: StepCosts) -> slo_scheduling.Options:
        """The same for the simulation."""
        return slo_scheduling.Options(
            requests=self.requests,
            max_batch=self.max_batch,
            max_overtaken=self.max_overtaken,
            ttft_slack=self.ttft_slack,
            tpot_slack=self.tpot_slack,
            fixed_s=costs.fixed_s,
            sequence_s=costs.sequence_s,
            prompt_token_s=costs.prompt_token_s,
            step_tokens=costs.step_tokens,
        )


class Unbounded(AnswerLengths):
    """Expects answers without regard to what a request may get: here that is its very length."""

    def expected(self, task: str, max_tokens: int) -> int:
        """As the base class, without the bound."""
        return super().expected(task, 10**9)


class Served(NamedTuple):
    """How a job fared."""

    job: Job
    generation: Generation

    @property
    def keeps(self) -> bool:
        """Whether its first token and its pace were in time."""
        request = self.job.request
        verdict = judge(
            self.generation.timings,
            self.generation.num_tokens,
            ttft_s=request.ttft_s,
            tpot_s=request.tpot_s,
        )
        return verdict == "kept"

    @property
    def ttft_s(self) -> float:
        """From submission to the first token."""
        timings = self.generation.timings
        assert timings.first_token_s is not None
        return timings.first_token_s - timings.arrived_s


@dataclass(kw_only=True)
class Cell:
    """Runs of a scheduler at a load, one per repeat."""

    kept: list[float] = field(default_factory=list)
    simulated: list[float] = field(default_factory=list)
    kept_by_task: dict[str, list[float]] = field(
        default_factory=lambda: {task: [] for task in slo_scheduling.TASKS}
    )
    ttft_p50_s: list[float] = field(default_factory=list)
    ttft_p99_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    late_s: float = 0.0
    num_overtaken: int = 0
    first_token_error_s: list[float] = field(default_factory=list)
    end_error_s: list[float] = field(default_factory=list)

    def add(self, served: Sequence[Served], objectives: Objectives | None) -> None:
        """Count a run."""
        self.kept.append(float(np.mean([one.keeps for one in served])))
        for task, kept in self.kept_by_task.items():
            kept.append(float(np.mean([s.keeps for s in served if s.job.request.task == task])))
        ttfts_s = [one.ttft_s for one in served]
        self.ttft_p50_s.append(float(np.percentile(ttfts_s, 50)))
        self.ttft_p99_s.append(float(np.percentile(ttfts_s, 99)))
        if objectives is not None:
            num = max(1, objectives.num_estimates)
            self.num_overtaken += objectives.num_overtaken
            self.first_token_error_s.append(objectives.first_token_error_s / num)
            self.end_error_s.append(objectives.end_error_s / num)

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        row: dict[str, Any] = {
            name: spread(getattr(self, name))
            for name in ("kept", "simulated", "ttft_p50_s", "ttft_p99_s", "took_s")
        }
        row["kept_by_task"] = {task: spread(kept) for task, kept in self.kept_by_task.items()}
        row |= {"late_s": self.late_s, "num_overtaken": self.num_overtaken}
        for name in ("first_token_error_s", "end_error_s"):
            if values := getattr(self, name):
                row[name] = spread(values)
        return row


class Testbed:
    """The embedded model, served anew for each run."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._model, self._tokenizer = load_model("tiny_moe", dtype="float32", revision=None)
        config = self._model.config.get_text_config(decoder=True)
        self._vocab_size, self._context_tokens = config.vocab_size, config.max_position_embeddings

    def attach(self) -> Offload:
        """Serve the experts from slots until it is left."""
        slots = slots_at(self._options.residency, spec_of(self._model))
        return attach(self._model, policy="lfru", slots=slots)

    def costs(self, offload: Offload) -> StepCosts:
        """What steps cost, as a server measures it at its start."""
        objectives = Objectives()
        self._started(offload, objectives).shutdown()
        assert objectives.costs is not None
        return objectives.costs

    def recorded(self) -> list[tuple[float, int, int]]:
        """Recorded arrivals with lengths that fit this model."""
        path = data_dir() / "arrivals" / f"{self._options.arrivals}.csv.gz"
        shrink, most = self._options.shrink, self._context_tokens // 2
        return [
            (at_s, min(most, max(1, prompt // shrink)), min(most, max(1, answer // shrink)))
            for at_s, prompt, answer in recorded_arrivals(path)
        ]

    def run(
        self, offload: Offload, jobs: Sequence[Job], objectives: Objectives | None
    ) -> tuple[list[Served], float]:
        """Serve all jobs to their ends; also how late one was submitted at most."""
        rng = random.Random(0)
        requests = [
            GenerationRequest(
                request_id=job.request.name,
                prompt_ids=[
                    rng.randrange(16, self._vocab_size) for _ in range(job.request.prompt_tokens)
                ],
                prompt_text="",
                max_tokens=job.answer_tokens,
                sampling=SamplingParams(temperature=0.0),
                ignore_eos=True,
                ttft_s=job.request.ttft_s,
                tpot_s=job.request.tpot_s,
                task=job.request.task,
            )
            for job in jobs
        ]
        engine = self._started(offload, objectives)
        served, late_s = [], 0.0
        began_s = time.perf_counter()
        for job, request in zip(jobs, requests, strict=True):
            wait_s = job.request.arrival_s - (time.perf_counter() - began_s)
            time.sleep(max(0.0, wait_s))
            late_s = max(late_s, -wait_s)
            (generation,) = engine.submit([request], lambda piece: None)
            served.append(Served(job, generation))
        engine.shutdown(drain_s=_PATIENCE_S)
        for one in served:
            if one.generation.num_tokens != one.job.answer_tokens:
                raise RuntimeError(f"request {one.job.request.name} was not answered")
        return served, late_s

    def _started(self, offload: Offload, objectives: Objectives | None) -> GenerationEngine:
        engine = GenerationEngine(
            model=self._model,
            tokenizer=self._tokenizer,
            offload=offload,
            max_queue=10**6,
            mode="batched",
            max_batch=self._options.max_batch,
            scheduler="fifo" if objectives is None else SLO,
            objectives=objectives,
        )
        engine.start()
        while engine.state == "loading":
            time.sleep(0.01)
        if engine.failure is not None:
            raise engine.failure
        return engine


def run(options: Options) -> dict[str, Any]:
    """What steps cost, and a row for each load and scheduler."""
    testbed = Testbed(options)
    recorded = testbed.recorded()
    cells = {(load, name): Cell() for load in options.loads for name in SCHEDULERS}
    with testbed.attach() as offload:
        costs = testbed.costs(offload)
        simulated = options.simulated(costs)
        for repeat in range(options.repeats):
            for load in options.loads:
                jobs = slo_scheduling.make_jobs(recorded, simulated, load=load, seed=repeat)
                admits = slo_scheduling.schedulers(simulated, jobs)
                for name in SCHEDULERS if repeat % 2 == 0 else SCHEDULERS[::-1]:
                    cell = cells[load, name]
                    objectives = None
                    if name == SLO:
                        objectives = Objectives(
                            costs=costs, max_overtaken=options.max_overtaken, lengths=Unbounded()
                        )
                    started_s = time.perf_counter()
                    served, late_s = testbed.run(offload, jobs, objectives)
                    cell.took_s.append(time.perf_counter() - started_s)
                    cell.add(served, objectives)
                    cell.late_s = max(cell.late_s, late_s)
                    by_costs = simulate(
                        jobs, admits[_SIMULATED[name]], costs=costs, max_batch=options.max_batch
                    )
                    cell.simulated.append(float(np.mean([one.keeps for one in by_costs])))
                    _say(cells, options.repeats, f"load {load:g}, {name}: {cell.kept[-1]:.1%} kept")
    return {
        "costs": {
            name: getattr(costs, name) for name in ("fixed_s", "sequence_s", "prompt_token_s")
        },
        "rows": [
            {"load": load, "scheduler": name, **cell.as_row()}
            for (load, name), cell in cells.items()
        ],
    }


def _say(cells: Mapping[tuple[float, str], Cell], repeats: int, what: str) -> None:
    """A line of progress to standard error."""
    took_s = [one for cell in cells.values() for one in cell.took_s]
    left_s = sum(took_s) / len(took_s) * (len(cells) * repeats - len(took_s))
    print(f"{len(took_s)} of {len(cells) * repeats}: {what}; {left_s:.0f} s more", file=sys.stderr)


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    values = run(options)
    table = [
        [
            f"{row['load']:g} {row['scheduler']}",
            f"{row['kept']['median']:.1%} ({row['kept']['min']:.1%}..{row['kept']['max']:.1%})",
            f"{row['simulated']['median']:.1%}",
            *(f"{row['kept_by_task'][task]['median']:.1%}" for task in slo_scheduling.TASKS),
            f"{row['ttft_p50_s']['median']:.2f}",
            f"{row['ttft_p99_s']['median']:.2f}",
            str(row["num_overtaken"]),
        ]
        for row in values["rows"]
    ]
    header = ["load, scheduler", "kept (spread)", "simulated", *slo_scheduling.TASKS]
    print(format_table([*header, "TTFT p50, s", "p99, s", "overtaken"], table))
    record(
        "slo_live",
        {"options": as_json(options), **values},
        out=Path(options.out) if options.out else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
