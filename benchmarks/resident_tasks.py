"""eMoE's loading by task: what it wins over loading without tasks, and for how many bytes.

    python -m benchmarks.resident_tasks             # needs the folder MOECAST_DATA; some minutes

A stream of requests of six tasks, none of which anything was fitted on, is answered one after the
other by `attach(mode="resident_only")`, as a server does it: residents change only where one
begins, by the requests until the next decision of which at most ``queue`` are known. Quality is
that of `runtime.restricted_quality` (teacher-forced against all experts). Who is resident:

- popular: those that all tasks use most, for good (no bytes, no tasks);
- agnostic: Eq. 2 for one task, f by the sequence predictor from the last requests of any task;
- tasks: Eq. 2, f from the profile of each task, tasks read by the classifier;
- tasks + predictor: Eq. 2, f by the sequence predictor from each task's own last requests;
- own: what the period's requests themselves use under the full model: a bound nobody can reach.

Three tables: over residencies at period 1; over periods; over the two skip rules. Gains are over
"popular", request by request. MB are loaded for each request, on average. Streams are
"mixed" (every request's task drawn anew, eMoE §5) or in "runs" (the task stays with ``stay``).
Ends with one line of JSON.

Shape letters: G tasks · L MoE layers · E experts per layer.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.options import as_json, parse_options
from benchmarks.record import record
from benchmarks.task_streams import (
    Asked,
    StreamOptions,
    ask,
    learn_profile,
    learn_sequence,
    learn_uses,
    read_prompts,
)
from data.adapters import moe_layers, spec_of
from data.models import load_model
from data.tables import format_table
from predictors.task import Task
from predictors.task_profile import TaskProfile, pooled
from runtime.budget import slots_at
from runtime.engine import attach
from runtime.observed_request import PassRow
from runtime.offload import Offload
from runtime.resident_planner import ResidentPlanner
from runtime.restricted_quality import Quality, judge, say_all, summed_up

WAYS = ("popular", "agnostic", "tasks", "tasks + predictor", "own")


@dataclass(frozen=True, kw_only=True)
class Options(StreamOptions):
    """What is measured; the streams are those of `StreamOptions`.

    Attributes:
        residencies: Shares of the experts that have a slot, at period 1.
        periods: p, at ``sweep_residency``.
        sweep_residency: Of the tables over periods and skip rules.
        skip_losses: Of our skip rule, at period 1.
        min_agreements: Of the paper's skip rule, at period 1.
        queue: Requests known at a decision, the one that begins among them.
        out: Where to keep the result, or "".
    """

    residencies: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    periods: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    sweep_residency: float = 0.4
    skip_losses: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2)
    min_agreements: tuple[float, ...] = (0.8, 0.85, 0.9)
    queue: int = 8
    out: str = ""


class Learned(NamedTuple):
    """What was learned before the stream.

    Attributes:
        profile: Of the tasks.
        of_task: The sequence predictor for the requests of one task.
        of_any: The same for a stream like the one that is asked.
    """

    profile: TaskProfile
    of_task: Task
    of_any: Task


@contextmanager
def restricted(model: Any, residency: float, profile: TaskProfile, store: str) -> Iterator[Offload]:
    """The model with so many experts resident, at first those that all tasks use most."""
    with attach(
        model,
        mode="resident_only",
        slots=slots_at(residency, profile.spec),
        resident_scores_LE=profile.use_GLE.mean(dim=0),
        store_dir=store,
    ) as offload:
        yield offload


def planner_of(
    way: str, learned: Learned, offload: Offload, **options: Any
) -> ResidentPlanner | None:
    """Who plans residents; None for ways that need nobody."""
    if way not in ("agnostic", "tasks", "tasks + predictor"):
        return None
    profile = pooled(learned.profile) if way == "agnostic" else learned.profile
    predictor = {"agnostic": learned.of_any, "tasks + predictor": learned.of_task}.get(way)
    return ResidentPlanner(profile=profile, slots=offload.slots, predictor=predictor, **options)


def replay(
    model: Any,
    offload: Offload,
    stream: Sequence[Asked],
    planner: ResidentPlanner | None,
    *,
    own_period: int | None,
    queue: int,
    expert_bytes: int,
) -> tuple[list[Quality], dict[str, Any]]:
    """Answer the stream.

    Args:
        model: With its experts offloaded.
        offload: How.
        stream: The requests.
        planner: Decides who is resident, or None.
        own_period: Without one: requests between two looks at what they will use; None never looks.
        queue: Requests known at a decision.
        expert_bytes: Of one expert of one layer.

    Returns:
        Quality of each request; and its means, bytes and seconds of loading a request, and the
        share of tokens rerouted.
    """
    before, load_s, quality = offload.stats(), 0.0, []
    at = 0

    def waiting(limit: int) -> list[tuple[str, int]]:
        known = stream[at + 1 : at + min(queue, limit + 1)]
        return [(one.prompt, one.full.start) for one in known]

    if planner is not None:
        offload.plan_residents(planner, waiting=waiting)
    for at, asked in enumerate(stream):
        ids = asked.full.ids_T[: asked.full.start].tolist()
        started_s = time.perf_counter()
        if planner is not None:
            offload.announce([PassRow(str(at), asked.prompt, ids, ids, 0)])
        elif own_period is not None and at % own_period == 0:
            uses = [one.full.use_LE for one in stream[at : at + own_period]]
            offload.keep_resident(torch.stack(uses).mean(dim=0))
        load_s += time.perf_counter() - started_s
        quality.append(judge(model, asked.full))
        if planner is not None:
            offload.end_request(str(at))
    after, num = offload.stats(), len(stream)
    assert after.misses == 0  # whatever was loaded was loaded between requests
    return quality, {
        **summed_up(quality),
        "rerouted": (after.rerouted - before.rerouted) / (after.routed - before.routed),
        "loaded_bytes_per_request": (after.moved - before.moved) * expert_bytes / num,
        "load_s_per_request": load_s / num,
        "layers_kept": None
        if planner is None
        else planner.layers_kept / (planner.layers_kept + planner.layers_changed),
    }


def gain_over(base: Sequence[Quality], found: Sequence[Quality]) -> dict[str, float]:
    """How much more agrees than with other residents, request by request; its standard error."""
    more = [one.agreement - other.agreement for one, other in zip(found, base, strict=True)]
    error = np.std(more, ddof=1) / math.sqrt(len(more)) if len(more) > 1 else 0.0
    return {"agreement_gain": float(np.mean(more)), "agreement_gain_se": float(error)}


def measure(
    model: Any, stream: Sequence[Asked], learned: Learned, options: Options, store: str
) -> dict[str, Any]:
    """The three tables of one stream."""
    expert_bytes = moe_layers(model)[0].expert_bytes
    popular: dict[float, list[Quality]] = {}

    def answer(way: str, residency: float, *, period: int = 1, **rules: Any) -> dict[str, Any]:
        with restricted(model, residency, learned.profile, store) as offload:
            settings = {"period": period, "skip_loss": 0.0, "min_agreement": 1.1, **rules}
            quality, found = replay(
                model,
                offload,
                stream,
                planner_of(way, learned, offload, **settings),
                own_period=period if way == "own" else None,
                queue=options.queue,
                expert_bytes=expert_bytes,
            )
        if way == "popular":
            popular[residency] = quality
        gain = gain_over(popular[residency], quality)
        return {"way": way, "residency": residency, **settings, **found, **gain}

    sweep = options.sweep_residency
    residencies = sorted({*options.residencies, sweep})
    return {
        "residencies": [answer(w, residency) for residency in residencies for w in WAYS],
        "periods": [answer(w, sweep, period=p) for p in options.periods for w in WAYS[1:]],
        "skips": [
            *(answer("tasks", sweep, skip_loss=loss) for loss in options.skip_losses),
            *(answer("tasks", sweep, min_agreement=least) for least in options.min_agreements),
        ],
    }


def run(options: Options) -> dict[str, Any]:
    """All tables of both streams."""
    model, tokenizer = load_model(options.model, dtype="float32")
    spec = spec_of(model, model_id=options.model)
    prompts = read_prompts(options, tokenizer)
    said = {
        task: say_all(model, [ids_T for _, ids_T in listed], spec, options.answer_tokens)
        for task, listed in prompts["test"].items()
    }
    num_slots = slots_at(options.sweep_residency, spec)
    profile = learn_profile(model, options, spec, prompts, num_slots=num_slots)
    uses = learn_uses(model, options, spec, prompts)
    of_task = learn_sequence(uses, options, spec, arrivals=None)
    result: dict[str, Any] = {
        "model": spec.describe(),
        "tasks": profile.tasks,
        "num_fit_prompts": sum(len(listed) for listed in prompts["fit"].values()),
        "agreement_GL": profile.agreement_GL.tolist(),
        "streams": {},
    }
    for arrivals in options.arrivals:
        of_any = learn_sequence(uses, options, spec, arrivals=arrivals)
        stream = ask(prompts, said, options, arrivals)
        read = profile.reader.read
        right = [profile.tasks[read(one.prompt)] == one.task for one in stream]
        with tempfile.TemporaryDirectory() as store:
            tables = measure(model, stream, Learned(profile, of_task, of_any), options, store)
        result["streams"][arrivals] = {
            "num_requests": len(stream),
            "tasks_read_right": sum(right) / len(right),
            **tables,
        }
    result["expert_bytes"] = moe_layers(model)[0].expert_bytes
    return result


def main(arguments: Sequence[str]) -> None:
    """Run, print tables and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    result = run(options)
    header = [
        "way",
        "resident",
        "p",
        "skip",
        "min agr.",
        "agreement",
        "gain",
        "KL",
        "ppl",
        "MB loaded",
    ]
    for arrivals, found in result["streams"].items():
        print(
            f"{arrivals}: {found['num_requests']} requests, tasks read right "
            f"{found['tasks_read_right']:.0%}"
        )
        for name in ("residencies", "periods", "skips"):
            print(name)
            print(format_table(header, [_cells(row) for row in found[name]]))
    out = Path(options.out) if options.out else None
    record("resident_tasks", {"options": as_json(options), **result}, out=out)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["way"],
        f"{row['residency']:.0%}",
        str(row["period"]),
        f"{row['skip_loss']}",
        f"{row['min_agreement']}",
        f"{row['agreement']:.1%} ±{row['agreement_se']:.1%}",
        f"{row['agreement_gain']:+.1%} ±{row['agreement_gain_se']:.1%}",
        f"{row['kl_nats']:.3f}",
        f"{row['perplexity']:.1f}",
        f"{row['loaded_bytes_per_request'] / 1e6:.2f}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
