"""How many requests keep their objectives: eMoE's admission against first in, first out.

    python -m benchmarks.slo_scheduling                          # about a minute on one core
    python -m benchmarks.slo_scheduling requests=300 seeds=1     # a look

A simulation of the batching server (`benchmarks.slo_simulation`) on recorded arrivals and lengths.
What a pass costs is measured: the defaults are those of ``python -m benchmarks.step_costs`` on the
embedded model, all experts resident, on one core of an AMD EPYC. The times between arrivals are
scaled to ``load``: at 1, requests bring as much work as full batches can just do.

Half of the requests, drawn by seed, are "interactive", the others "background": tasks that differ
in their objectives, which the paper does not state. Objectives are multiples of what an undisturbed
server gives: ``ttft_slack`` of the time that reading a prompt of mean length takes, ``tpot_slack``
of that of a full batch's pass, with its share of prompts. An answer's expected length is its mean
in requests that came before all that are replayed (Eq. 3's profile), or the truth: what knowing it
would give. A request counts as kept if first token and pace are both in time; very long prompts are
not, whatever the scheduler does, as the lowest load shows.

Schedulers: first in, first out; shortest job first, by true lengths; earliest first-token deadline
first; and `runtime.scheduler.SloScheduler`, also without its bound on overtaking, which tells what
not to starve anybody costs. Each seed is another window of the trace and other tasks, the same for
all schedulers. Ends with one line of JSON.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from benchmarks.slo_simulation import AdmitFn, Job, Moment, Served, simulate
from benchmarks.soak_load import recorded_arrivals
from data.importers.catalog import data_dir
from data.tables import format_table
from runtime.scheduler import MAX_OVERTAKEN, SloRequest, SloScheduler, StepCosts

_PROFILED = 2000  # first requests of the trace, of which answers' mean length is known
TASKS = ("interactive", "background")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is simulated.

    Attributes:
        arrivals: A file of the data folder's arrivals, without its endings.
        requests: Of each run.
        loads: See above.
        seeds: Windows of the trace.
        max_batch: Sequences that run at once.
        max_tokens: T_max, of prompts and expected answers; 0 for no limit.
        max_overtaken: The scheduler's bound on waiting.
        ttft_slack: Of interactive and of background requests.
        tpot_slack: The same.
        fixed_s: Of a pass.
        sequence_s: Of a sequence in it.
        prompt_token_s: Of a prompt token in it.
        step_tokens: The most tokens of a pass.
        out: Where to keep the result, or "".
    """

    arrivals: str = "azure_llm_2023_conv"
    requests: int = 2000
    loads: tuple[float, ...] = (0.1, 0.5, 0.8, 0.9, 1.0, 1.2)
    seeds: int = 5
    max_batch: int = 16
    max_tokens: int = 0
    max_overtaken: int = MAX_OVERTAKEN
    ttft_slack: tuple[float, ...] = (5.0, 50.0)
    tpot_slack: tuple[float, ...] = (1.5, 4.0)
    fixed_s: float = 7.80e-3
    sequence_s: float = 0.559e-3
    prompt_token_s: float = 0.160e-3
    step_tokens: int = 256
    out: str = ""

    def __post_init__(self) -> None:
        """Check what each task has one of."""
        for name in ("ttft_slack", "tpot_slack"):
            if len(getattr(self, name)) != len(TASKS):
                raise ValueError(f"{name}={getattr(self, name)}: give one for each of {TASKS}")

    @property
    def costs(self) -> StepCosts:
        """Of a pass."""
        return StepCosts(
            fixed_s=self.fixed_s,
            sequence_s=self.sequence_s,
            prompt_token_s=self.prompt_token_s,
            step_tokens=self.step_tokens,
        )


def schedulers(options: Options, jobs: Sequence[Job]) -> dict[str, AdmitFn]:
    """By name, which says what is known of answers' lengths, if anything."""
    slo, unbounded = (
        SloScheduler(
            costs=options.costs,
            max_batch=options.max_batch,
            max_tokens=options.max_tokens or float("inf"),
            max_overtaken=max_overtaken,
        )
        for max_overtaken in (options.max_overtaken, len(jobs))
    )
    true_tokens = {job.request.name: job.answer_tokens for job in jobs}

    def by(key: Callable[[SloRequest], float]) -> AdmitFn:
        def admit(moment: Moment) -> Sequence[SloRequest]:
            return sorted(moment.waiting, key=key)[: options.max_batch - len(moment.running)]

        return admit

    def knowing(request: SloRequest) -> SloRequest:
        return SloRequest(
            name=request.name,
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            expected_tokens=true_tokens[request.name],
            ttft_s=request.ttft_s,
            tpot_s=request.tpot_s,
            load_s=request.load_s,
            task=request.task,
        )

    def slo_by_truth(moment: Moment) -> Sequence[SloRequest]:
        taken = slo.admit(
            now_s=moment.now_s,
            running=[one._replace(request=knowing(one.request)) for one in moment.running],
            waiting=[knowing(request) for request in moment.waiting],
            overtaken=moment.overtaken,
        )
        own = {request.name: request for request in moment.waiting}
        return [own[request.name] for request in taken]

    return {
        "fifo": by(lambda request: request.arrival_s),
        "sjf, true lengths": by(
            lambda request: work_s(
                request.prompt_tokens, true_tokens[request.name], options.costs, options.max_batch
            )
        ),
        "deadline first": by(lambda request: request.arrival_s + request.ttft_s),
        "slo, mean lengths": lambda moment: slo.admit(**moment._asdict()),
        "slo, true lengths": slo_by_truth,
        "slo, mean lengths, no bound": lambda moment: unbounded.admit(**moment._asdict()),
    }


def work_s(prompt_tokens: float, answer_tokens: float, costs: StepCosts, batch: int) -> float:
    """A request's share of the time of full batches."""
    token_s = costs.step_s(num_sequences=batch, num_prompt_tokens=0) / batch
    return token_s * answer_tokens + costs.prompt_token_s * prompt_tokens


def make_jobs(
    recorded: Sequence[tuple[float, int, int]], options: Options, *, load: float, seed: int
) -> list[Job]:
    """The requests of a run: a window of the trace, behind what is profiled."""
    rng = np.random.default_rng(seed)
    last_start = len(recorded) - options.requests
    if last_start <= _PROFILED:
        raise ValueError(
            f"requests={options.requests}: the trace has {len(recorded)}, of which {_PROFILED} "
            "are only profiled"
        )
    start = int(rng.integers(_PROFILED, last_start))
    window = recorded[start : start + options.requests]
    answer_mean = float(np.mean([answer for *_, answer in recorded[:_PROFILED]]))
    prompt_mean = float(np.mean([prompt for _, prompt, _ in recorded[:_PROFILED]]))
    works_s = [work_s(p, a, options.costs, options.max_batch) for _, p, a in window]
    begin_s, end_s = window[0][0], window[-1][0]
    stretch = sum(works_s) / load / (end_s - begin_s)
    read_s = options.costs.step_s(num_sequences=1, num_prompt_tokens=round(prompt_mean))
    pass_s = options.max_batch * work_s(
        prompt_mean / answer_mean, 1.0, options.costs, options.max_batch
    )
    tasks = rng.integers(0, len(TASKS), len(window))
    return [
        Job(
            SloRequest(
                name=str(index),
                arrival_s=(arrival_s - begin_s) * stretch,
                prompt_tokens=prompt,
                expected_tokens=round(answer_mean),
                ttft_s=options.ttft_slack[task] * read_s,
                tpot_s=options.tpot_slack[task] * pass_s,
                task=TASKS[task],
            ),
            answer,
        )
        for index, ((arrival_s, prompt, answer), task) in enumerate(
            zip(window, tasks.tolist(), strict=True)
        )
    ]


@dataclass(kw_only=True)
class Cell:
    """Runs of a scheduler at a load, one per seed."""

    kept: list[float] = field(default_factory=list)
    kept_by_task: dict[str, list[float]] = field(
        default_factory=lambda: {task: [] for task in TASKS}
    )
    ttft_p50_s: list[float] = field(default_factory=list)
    ttft_p99_s: list[float] = field(default_factory=list)
    most_overtaken: int = 0

    def add(self, served: Sequence[Served]) -> None:
        """Count a run."""
        self.kept.append(float(np.mean([one.keeps for one in served])))
        for task in TASKS:
            of_task = [one.keeps for one in served if one.job.request.task == task]
            self.kept_by_task[task].append(float(np.mean(of_task)))
        ttfts_s = [one.ttft_s for one in served]
        self.ttft_p50_s.append(float(np.percentile(ttfts_s, 50)))
        self.ttft_p99_s.append(float(np.percentile(ttfts_s, 99)))
        self.most_overtaken = max(self.most_overtaken, *(one.overtaken for one in served))

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kept": spread(self.kept),
            "kept_by_task": {task: spread(kept) for task, kept in self.kept_by_task.items()},
            "ttft_p50_s": spread(self.ttft_p50_s),
            "ttft_p99_s": spread(self.ttft_p99_s),
            "most_overtaken": self.most_overtaken,
        }


def run(options: Options) -> list[dict[str, Any]]:
    """A row for each load and scheduler."""
    recorded = recorded_arrivals(data_dir() / "arrivals" / f"{options.arrivals}.csv.gz")
    rows = []
    for load in options.loads:
        cells: dict[str, Cell] = {}
        for seed in range(options.seeds):
            jobs = make_jobs(recorded, options, load=load, seed=seed)
            for name, admit in schedulers(options, jobs).items():
                served = simulate(jobs, admit, costs=options.costs, max_batch=options.max_batch)
                cells.setdefault(name, Cell()).add(served)
        rows += [{"load": load, "scheduler": name, **cell.as_row()} for name, cell in cells.items()]
    return rows


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    options = parse_options(Options, arguments)
    rows = run(options)
    table = [
        [
            f"{row['load']:g} {row['scheduler']}",
            f"{row['kept']['median']:.1%} ({row['kept']['min']:.1%}..{row['kept']['max']:.1%})",
            *(f"{row['kept_by_task'][task]['median']:.1%}" for task in TASKS),
            f"{row['ttft_p50_s']['median']:.2f}",
            f"{row['ttft_p99_s']['median']:.2f}",
            str(row["most_overtaken"]),
        ]
        for row in rows
    ]
    header = ["load, scheduler", "kept (spread)", *TASKS, "TTFT p50, s", "p99, s", "overtaken"]
    print(format_table(header, table))
    record(
        "slo_scheduling",
        {"options": as_json(options), "rows": rows},
        out=Path(options.out) if options.out else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
