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

Three tables: over residencies at period 1; over periods; over the two skip rules. Streams are
"mixed" (every request's task drawn anew, eMoE §5) or in "runs" (the task stays with ``stay``).
Ends with one line of JSON.

Shape letters: T tokens · L MoE layers · E experts per layer · N requests.
"""

import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.options import as_json, parse_options
from benchmarks.record import record
from data.adapters import moe_layers, spec_of
from data.models import load_model
from data.observe import RouterRecorder
from data.schema import MoESpec
from data.sources.task_prompts import TaskPrompts
from data.splits import split_by_topic
from data.tables import format_table
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.task import Task
from predictors.task_classifier import ClassifierReader
from predictors.task_profile import TaskProfile, pooled
from runtime.budget import slots_at
from runtime.engine import attach
from runtime.observed_request import PassRow
from runtime.offload import Offload
from runtime.profile_tasks import profile_tasks
from runtime.resident_planner import ResidentPlanner
from runtime.restricted_quality import Full, judge, logprobs_of, say_all, summed_up, use_of

WAYS = ("popular", "agnostic", "tasks", "tasks + predictor", "own")
ARRIVALS = ("mixed", "runs")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        model: As `data.models.load_model` has it.
        num_prompts: Of all tasks; 70 % are fitted on, 20 % are there to be asked.
        num_requests: Of the stream.
        prompt_tokens: Of a prompt at most.
        answer_tokens: Of each answer.
        residencies: Shares of the experts that have a slot, at period 1.
        periods: p, at ``sweep_residency``.
        sweep_residency: Of the tables over periods and skip rules.
        skip_losses: Of our skip rule, at period 1.
        min_agreements: Of the paper's skip rule, at period 1.
        queue: Requests known at a decision, the one that begins among them.
        arrivals: Streams, of `ARRIVALS`.
        stay: Probability that a request of a stream in runs has the task of the one before.
        judged: Prompts of a task that the profile restricts layers for.
        epochs: Of the sequence predictor.
        seed: Of streams and fitting.
        out: Where to keep the result, or "".
    """

    model: str = "tiny_moe"
    num_prompts: int = 360
    num_requests: int = 48
    prompt_tokens: int = 64
    answer_tokens: int = 16
    residencies: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    periods: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    sweep_residency: float = 0.4
    skip_losses: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2)
    min_agreements: tuple[float, ...] = (0.8, 0.85, 0.9)
    queue: int = 8
    arrivals: tuple[str, ...] = ARRIVALS
    stay: float = 0.9
    judged: int = 3
    epochs: int = 6
    seed: int = 0
    out: str = ""

    def __post_init__(self) -> None:
        """Check the names."""
        if unknown := set(self.arrivals) - set(ARRIVALS):
            raise ValueError(f"arrivals={sorted(unknown)}: must be of {ARRIVALS}")


class Asked(NamedTuple):
    """A request of the stream.

    Attributes:
        task: Its true one.
        prompt: Its text.
        full: What the full model says.
    """

    task: str
    prompt: str
    full: Full


class Fitted(NamedTuple):
    """What was learned from the fit prompts.

    Attributes:
        profile: Of the tasks.
        of_task: The sequence predictor, fitted on requests of one task after the other.
        of_any: The same, fitted on a stream like the one that is asked.
    """

    profile: TaskProfile
    of_task: Task
    of_any: Task


def read_prompts(
    options: Options, tokenizer: Any
) -> dict[str, dict[str, list[tuple[str, Tensor]]]]:
    """Text and token ids of the prompts of each split and task."""
    prompts = list(TaskPrompts(num_prompts=options.num_prompts).prompts())
    split = split_by_topic({p.request_id: p.topic for p in prompts}, seed=options.seed)
    found: dict[str, dict[str, list[tuple[str, Tensor]]]] = defaultdict(lambda: defaultdict(list))
    for prompt in sorted(prompts, key=lambda p: p.topic):
        ids = tokenizer(prompt.text).input_ids[: options.prompt_tokens]
        if len(ids) > 1:
            found[split[prompt.request_id]][prompt.topic].append((prompt.text, torch.tensor(ids)))
    return found


def arrange(sizes: dict[str, int], num: int, *, stay: float, seed: int) -> list[str]:
    """The task of each request of a stream; no task comes more often than it has requests.

    Raises:
        ValueError: There are fewer requests than asked for.
    """
    if num > sum(sizes.values()):
        raise ValueError(f"num_requests={num}: there are {sum(sizes.values())} held out")
    drawn: list[str] = []
    left, rng = dict(sizes), random.Random(seed)
    for _ in range(num):
        stays = bool(drawn) and rng.random() < stay and left[drawn[-1]] > 0
        task = drawn[-1] if stays else rng.choice([task for task in sorted(left) if left[task]])
        left[task] -= 1
        drawn.append(task)
    return drawn


def fit(model: Any, options: Options, spec: MoESpec, prompts: Any, *, stay: float) -> Fitted:
    """Learn everything from fit prompts; the sequence predictors' epochs are chosen on "val"."""
    texts = {task: [text for text, _ in listed] for task, listed in prompts["fit"].items()}
    profile = profile_tasks(
        model,
        {task: [ids_T for _, ids_T in listed] for task, listed in prompts["fit"].items()},
        spec=spec,
        make_reader=lambda _: ClassifierReader.fit(
            texts, embedder=TokenMeanEmbedder(model=options.model)
        ),
        num_slots=slots_at(options.sweep_residency, spec),
        answer_tokens=options.answer_tokens,
        judged=options.judged,
        seeds=1,
    )
    uses: dict[str, dict[str, list[Tensor]]] = {"fit": {}, "val": {}}
    for split, of_task in uses.items():
        for task, listed in prompts[split].items():
            with RouterRecorder(model, keep_router_probs=False) as tap:
                of_task[task] = []
                for _, ids_T in listed:
                    logprobs_of(model, ids_T)
                    of_task[task].append(use_of(tap.take().ids_NLK, spec))
    predictors = []
    for is_mixed in (False, True):
        streams = [_stream(uses[split], options, stay, is_mixed) for split in ("fit", "val")]
        predictor = Task(period=1, epochs=options.epochs, seed=options.seed)
        predictor.fit_streams(*streams)
        predictor.spec = spec
        predictors.append(predictor)
    return Fitted(profile, *predictors)


def _stream(uses: dict[str, list[Tensor]], options: Options, stay: float, is_mixed: bool) -> Tensor:
    """float32 [N, L, E], as they arrive or one task after the other."""
    if not is_mixed:
        return torch.stack([use_LE for task in sorted(uses) for use_LE in uses[task]])
    sizes = {task: len(listed) for task, listed in uses.items()}
    left = {task: iter(listed) for task, listed in uses.items()}
    order = arrange(sizes, sum(sizes.values()), stay=stay, seed=options.seed + 1)
    return torch.stack([next(left[task]) for task in order])


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
    way: str, fitted: Fitted, offload: Offload, **options: Any
) -> ResidentPlanner | None:
    """Who plans residents; None for ways that need nobody."""
    if way not in ("agnostic", "tasks", "tasks + predictor"):
        return None
    profile = pooled(fitted.profile) if way == "agnostic" else fitted.profile
    predictor = {"agnostic": fitted.of_any, "tasks + predictor": fitted.of_task}.get(way)
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
) -> dict[str, Any]:
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
        Quality, bytes and seconds of loading a request, and the share of tokens rerouted.
    """
    before, load_s, quality = offload.stats(), 0.0, []
    at = 0

    def waiting() -> list[tuple[str, int]]:
        return [(one.prompt, one.full.start) for one in stream[at + 1 : at + queue]]

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
    return {
        **summed_up(quality),
        "rerouted": (after.rerouted - before.rerouted) / (after.routed - before.routed),
        "loaded_bytes_per_request": (after.moved - before.moved) * expert_bytes / num,
        "load_s_per_request": load_s / num,
        "layers_kept": None
        if planner is None
        else planner.layers_kept / (planner.layers_kept + planner.layers_changed),
    }


def measure(
    model: Any, stream: Sequence[Asked], fitted: Fitted, options: Options, store: str
) -> dict[str, Any]:
    """The three tables of one stream."""
    expert_bytes = moe_layers(model)[0].expert_bytes

    def answer(way: str, residency: float, *, period: int = 1, **rules: Any) -> dict[str, Any]:
        with restricted(model, residency, fitted.profile, store) as offload:
            settings = {"period": period, "skip_loss": 0.0, "min_agreement": 1.1, **rules}
            found = replay(
                model,
                offload,
                stream,
                planner_of(way, fitted, offload, **settings),
                own_period=period if way == "own" else None,
                queue=options.queue,
                expert_bytes=expert_bytes,
            )
        return {"way": way, "residency": residency, **settings, **found}

    sweep = options.sweep_residency
    return {
        "residencies": [answer(w, residency) for residency in options.residencies for w in WAYS],
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
    test = prompts["test"]
    said = {
        task: say_all(model, [ids_T for _, ids_T in listed], spec, options.answer_tokens)
        for task, listed in test.items()
    }
    result: dict[str, Any] = {"model": spec.describe(), "tasks": sorted(test), "streams": {}}
    for arrivals in options.arrivals:
        stay = options.stay if arrivals == "runs" else 0.0
        fitted = fit(model, options, spec, prompts, stay=stay)
        sizes = {task: len(listed) for task, listed in test.items()}
        left = {
            task: iter(
                [
                    Asked(task, text, full)
                    for (text, _), full in zip(listed, said[task], strict=True)
                ]
            )
            for task, listed in test.items()
        }
        order = arrange(sizes, options.num_requests, stay=stay, seed=options.seed)
        stream = [next(left[task]) for task in order]
        read = fitted.profile.reader.read
        right = [fitted.profile.tasks[read(one.prompt)] == one.task for one in stream]
        with tempfile.TemporaryDirectory() as store:
            tables = measure(model, stream, fitted, options, store)
        result["streams"][arrivals] = {
            "num_requests": len(stream),
            "num_fit_prompts": sum(len(listed) for listed in prompts["fit"].values()),
            "tasks_read_right": sum(right) / len(right),
            "agreement_GL": fitted.profile.agreement_GL.tolist(),
            **tables,
        }
    result["expert_bytes"] = moe_layers(model)[0].expert_bytes
    return result


def main(arguments: Sequence[str]) -> None:
    """Run, print tables and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    result = run(options)
    header = ["way", "resident", "p", "skip", "min agr.", "agreement", "KL", "ppl", "MB loaded"]
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
        f"{row['kl_nats']:.3f}",
        f"{row['perplexity']:.1f}",
        f"{row['loaded_bytes_per_request'] / 1e6:.2f}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
