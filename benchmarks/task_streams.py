"""Streams of requests of several tasks, and what is learned before they are asked.

Prompts are those of `data.sources.task_prompts`, by request in three splits: everything is fitted
on "fit" (epochs chosen on "val"), and "test" is asked. Knows nothing of who is resident.

Shape letters: T tokens · L MoE layers · E experts per layer · N requests.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.schema import MoESpec
from data.sources.task_prompts import TaskPrompts
from data.splits import split_by_topic
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.task import Task
from predictors.task_classifier import ClassifierReader
from predictors.task_profile import TaskProfile
from runtime.profile_tasks import profile_tasks
from runtime.restricted_quality import Full, say_all

ARRIVALS = ("mixed", "runs")
# By split and task: each prompt's text and token ids; what each uses, float32 [L, E].
Prompts = Mapping[str, Mapping[str, Sequence[tuple[str, Tensor]]]]
Uses = Mapping[str, Mapping[str, Sequence[Tensor]]]


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What streams are of.

    Attributes:
        model: As `data.models.load_model` has it.
        num_prompts: Of all tasks; 70 % are fitted on, 20 % are there to be asked.
        num_requests: Of a stream.
        prompt_tokens: Of a prompt at most.
        answer_tokens: Of each answer.
        arrivals: Streams, of `ARRIVALS`: each request's task drawn anew, or staying for a while.
        stay: Probability that a request of a stream in runs has the task of the one before.
        judged: Prompts of a task that the profile restricts layers for.
        epochs: Of the sequence predictors.
        seed: Of streams and fitting.
    """

    model: str = "tiny_moe"
    num_prompts: int = 360
    num_requests: int = 48
    prompt_tokens: int = 64
    answer_tokens: int = 16
    arrivals: tuple[str, ...] = ARRIVALS
    stay: float = 0.9
    judged: int = 3
    epochs: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the names."""
        if unknown := set(self.arrivals) - set(ARRIVALS):
            raise ValueError(f"arrivals={sorted(unknown)}: must be of {ARRIVALS}")

    def stay_of(self, arrivals: str) -> float:
        """Of a stream by its name."""
        return self.stay if arrivals == "runs" else 0.0


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


def read_prompts(options: StreamOptions, tokenizer: Any) -> Prompts:
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


def ask(
    prompts: Prompts, said: Mapping[str, Sequence[Full]], options: StreamOptions, arrivals: str
) -> list[Asked]:
    """A stream of "test" prompts.

    Args:
        prompts: Of all splits.
        said: What the full model says of the "test" prompts of each task.
        options: How many are asked.
        arrivals: How they follow one another.
    """
    test = prompts["test"]
    left = {
        task: iter([Asked(task, text, full) for (text, _), full in zip(*both, strict=True)])
        for task, both in ((task, (listed, said[task])) for task, listed in test.items())
    }
    sizes = {task: len(listed) for task, listed in test.items()}
    order = arrange(sizes, options.num_requests, stay=options.stay_of(arrivals), seed=options.seed)
    return [next(left[task]) for task in order]


def learn_profile(
    model: Any, options: StreamOptions, spec: MoESpec, prompts: Prompts, *, num_slots: int
) -> TaskProfile:
    """The profile of the "fit" prompts, with a classifier as reader."""
    texts = {task: [text for text, _ in listed] for task, listed in prompts["fit"].items()}
    embedder = TokenMeanEmbedder(model=options.model)
    return profile_tasks(
        model,
        {task: [ids_T for _, ids_T in listed] for task, listed in prompts["fit"].items()},
        spec=spec,
        make_reader=lambda _: ClassifierReader.fit(texts, embedder=embedder),
        num_slots=num_slots,
        answer_tokens=options.answer_tokens,
        judged=options.judged,
        seeds=1,
    )


def learn_uses(model: Any, options: StreamOptions, spec: MoESpec, prompts: Prompts) -> Uses:
    """What each "fit" and "val" prompt and its answer use."""
    return {
        split: {
            task: [
                full.use_LE
                for _, ids_T in listed
                for full in say_all(model, [ids_T], spec, options.answer_tokens)
            ]
            for task, listed in prompts[split].items()
        }
        for split in ("fit", "val")
    }


def learn_sequence(
    uses: Uses, options: StreamOptions, spec: MoESpec, *, arrivals: str | None
) -> Task:
    """The sequence predictor.

    Args:
        uses: What it learns from.
        options: Its epochs, and how long tasks stay.
        spec: The model's MoE.
        arrivals: Of the stream that it shall follow; None for one task's requests after another's.
    """

    def stream_NLE(of_task: Mapping[str, Sequence[Tensor]]) -> Tensor:
        sizes = {task: len(listed) for task, listed in of_task.items()}
        num = sum(sizes.values())
        if arrivals is None:
            order = [task for task in sorted(sizes) for _ in range(sizes[task])]
        else:
            order = arrange(sizes, num, stay=options.stay_of(arrivals), seed=options.seed + 1)
        left = {task: iter(listed) for task, listed in of_task.items()}
        return torch.stack([next(left[task]) for task in order])

    predictor = Task(period=1, epochs=options.epochs, seed=options.seed)
    predictor.fit_streams(stream_NLE(uses["fit"]), stream_NLE(uses["val"]))
    predictor.spec = spec
    return predictor
