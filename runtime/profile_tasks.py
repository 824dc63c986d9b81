"""Measure, once and offline, what each task uses and what it tolerates: eMoE's profile.

    python -m runtime.profile_tasks out=outputs/profile                       # public prompts
    python -m runtime.profile_tasks out=outputs/profile prompts=mine.jsonl    # topic = task

``python serve.py serve.mode=resident_only serve.task_profile=outputs/profile`` reads it.

Source: eMoE §3.4. The paper randomises the routing of ever more layers from the input side up,
compares the output's text with the full model's by a sentence encoder, and calls a prefix of layers
insensitive where that stays above a threshold. Where we differ, and why:

- One layer at a time is restricted, all others are free: the skip rule asks what *that* layer
  costs. What all cost together is more: `benchmarks.resident_tasks` tells.
- It is restricted to random experts, as many as it will have slots (mean over drawings): what
  another task left resident is not worse. The paper's random routing knows no budget.
- Teacher-forced agreement and KL (`runtime.restricted_quality`) are kept as numbers; from which
  agreement on a layer counts as insensitive is decided where the profile is read.
- Frequencies f are those of these prompts and their answers; W_o is the mean length of those
  answers, cut at ``answer_tokens``.

Shape letters: G tasks · T tokens · L MoE layers · E experts per layer.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from data.cli import parse_cli
from data.errors import MoecastError
from data.models import load_model
from data.schema import MoESpec
from data.sources.base import PromptSource
from data.sources.jsonl import Jsonl
from data.sources.task_prompts import TaskPrompts
from data.tables import format_table
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.task_classifier import ClassifierReader
from predictors.task_profile import TaskProfile
from predictors.task_profile_file import save_profile
from predictors.task_reader import KeywordReader, TaskReader
from runtime.budget import slots_at
from runtime.resident_routing import ResidentRouting, most_wanted
from runtime.restricted_quality import Full, judge, say_all
from runtime.server.model_facts import eos_ids

logger = logging.getLogger(__name__)

READERS = ("classifier", "keywords")
MakeReader = Callable[[str], TaskReader]  # from the task that tolerates least


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of the command.

    out: the folder to write; prompts: a JSON-lines file whose topics are tasks, or null for public
    prompts of six tasks in the folder MOECAST_DATA; reader: classifier (right more often) or
    keywords (no embedding, people can mend them); residency: share of a restricted layer's experts;
    judged: prompts of each task that are answered under restriction; seeds: drawings of experts.
    """

    out: Path
    model: str = "tiny_moe"
    dtype: str = "auto"
    revision: str | None = None
    prompts: Path | None = None
    num_prompts: int = 300
    reader: str = "classifier"
    residency: float = 0.25
    prompt_tokens: int = 96
    answer_tokens: int = 32
    judged: int = 8
    seeds: int = 2

    def __post_init__(self) -> None:
        """Check the values."""
        if self.reader not in READERS:
            raise ValueError(f"reader={self.reader}: must be one of {', '.join(READERS)}")
        for name in ("num_prompts", "answer_tokens", "judged", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.prompt_tokens < 2:
            raise ValueError(f"prompt_tokens={self.prompt_tokens}: must be at least 2")
        if not 0 < self.residency <= 1:
            raise ValueError(f"residency={self.residency}: must be above 0 and at most 1")


def profile_tasks(
    model: Any,
    prompts: Mapping[str, Sequence[Tensor]],
    *,
    spec: MoESpec,
    make_reader: MakeReader,
    num_slots: int,
    answer_tokens: int = 32,
    judged: int = 8,
    seeds: int = 2,
    ends: Collection[int] = (),
    measured: Mapping[str, Any] | None = None,
) -> TaskProfile:
    """Answer each task's prompts, and some of them again with one layer restricted after another.

    Args:
        model: With all its experts.
        prompts: Token ids of each task's, int64 [T] of at least 2.
        spec: Its MoE.
        make_reader: Gives who reads these tasks from the name of the one that tolerates least.
        num_slots: Experts that a restricted layer has.
        answer_tokens: Of an answer at most.
        judged: Prompts of a task that are answered under restriction.
        seeds: Drawings of experts.
        ends: Token ids that end an answer.
        measured: What else to note.

    Raises:
        ValueError: A task has no prompts, or the routers cannot be restricted.
    """
    if empty := [task for task, ids in prompts.items() if not ids]:
        raise ValueError(f"tasks {empty} have no prompts of two tokens or more")
    tasks = sorted(prompts)
    tables: dict[str, list[Tensor]] = defaultdict(list)
    everybody_LE = torch.ones(spec.num_layers, spec.num_experts, dtype=torch.bool)
    routing = ResidentRouting(layers=moe_layers(model), spec=spec)
    try:
        for task in tasks:
            use_LE, lengths, num_tokens = torch.zeros(spec.num_layers, spec.num_experts), [], 0
            quality: list[Tensor] = []  # of each judged prompt, [2, L]
            for place, ids_T in enumerate(prompts[task]):
                routing.allow(everybody_LE)
                (full,) = say_all(model, [ids_T], spec, answer_tokens)
                num_read = len(full.ids_T) - 1
                use_LE += full.use_LE * num_read
                num_tokens += num_read
                lengths.append(_answer_length(full, ends))
                if place < judged:
                    quality.append(
                        _one_by_one(model, full, routing, spec, num_slots=num_slots, seeds=seeds)
                    )
            agreement_L, kl_L = torch.stack(quality).mean(dim=0)
            tables["use_GLE"].append(use_LE / num_tokens)
            tables["agreement_GL"].append(agreement_L)
            tables["kl_GL"].append(kl_L)
            tables["answer_tokens_G"].append(torch.tensor(float(sum(lengths)) / len(lengths)))
            logger.info("Task %s: %d prompts", task, len(prompts[task]))
    finally:
        routing.remove()
    agreement_GL = torch.stack(tables["agreement_GL"])
    reader = make_reader(tasks[int(agreement_GL.mean(dim=1).argmin())])
    if reader.tasks != tuple(tasks):
        raise ValueError(f"the reader knows the tasks {reader.tasks}, the prompts are of {tasks}")
    noted = {
        "num_slots": num_slots,
        "answer_tokens": answer_tokens,
        "judged": judged,
        "seeds": seeds,
        "prompts": {task: len(prompts[task]) for task in tasks},
        **(measured or {}),
    }
    stacked = {name: torch.stack(rows) for name, rows in tables.items()}
    return TaskProfile(spec=spec, reader=reader, measured=noted, **stacked)


def _one_by_one(
    model: Any,
    full: Full,
    routing: ResidentRouting,
    spec: MoESpec,
    *,
    num_slots: int,
    seeds: int,
) -> Tensor:
    """float32 [2, L]: agreement and KL with each layer restricted, mean over drawings."""
    found_2L = torch.zeros(2, spec.num_layers)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        drawn_LE = torch.rand(spec.num_layers, spec.num_experts, generator=generator)
        few_LE = most_wanted(drawn_LE, [num_slots] * spec.num_layers)
        for layer in range(spec.num_layers):
            resident_LE = torch.ones_like(few_LE)
            resident_LE[layer] = few_LE[layer]
            routing.allow(resident_LE)
            quality = judge(model, full)
            found_2L[:, layer] += torch.tensor([quality.agreement, quality.kl_nats])
    return found_2L / seeds


def _answer_length(full: Full, ends: Collection[int]) -> int:
    """Tokens until the answer ends by itself, the end included; all of them if it does not."""
    # What the model would have said: in the answer itself, ends were not allowed.
    answer = full.logprobs_TV[full.start - 1 :].argmax(dim=-1).tolist()
    return next((n for n, token_id in enumerate(answer, start=1) if token_id in ends), len(answer))


def make_reader(kind: str, texts: Mapping[str, Sequence[str]], *, model: str) -> MakeReader:
    """What makes a reader of a kind that has learned from ``texts``.

    Args:
        kind: One of `READERS`.
        texts: Of each task.
        model: Whose token embeddings a classifier reads.
    """
    if kind == "keywords":
        return lambda fallback: KeywordReader.fit(texts, fallback=fallback)
    ordered = {task: texts[task] for task in sorted(texts)}
    return lambda _: ClassifierReader.fit(ordered, embedder=TokenMeanEmbedder(model=model))


def run(settings: Settings) -> TaskProfile:
    """Measure and write; returns the profile.

    Raises:
        ValueError: The prompts have no topics, or fewer than two.
        MoecastError: The model cannot be loaded, or the prompts cannot be read.
    """
    source: PromptSource = (
        TaskPrompts(num_prompts=settings.num_prompts)
        if settings.prompts is None
        else Jsonl(path=str(settings.prompts), num_prompts=settings.num_prompts)
    )
    model, tokenizer = load_model(settings.model, dtype=settings.dtype, revision=settings.revision)
    spec = spec_of(model, model_id=settings.model)
    texts: dict[str, list[str]] = defaultdict(list)
    ids: dict[str, list[Tensor]] = defaultdict(list)
    for prompt in source.prompts():
        token_ids = tokenizer(prompt.text).input_ids[: settings.prompt_tokens]
        if len(token_ids) > 1:
            texts[prompt.topic].append(prompt.text)
            ids[prompt.topic].append(torch.tensor(token_ids))
    if len(texts) < 2 or "" in texts:
        raise ValueError(
            f"prompts={settings.prompts}: topics must name two tasks or more, not {sorted(texts)}"
        )
    profile = profile_tasks(
        model,
        ids,
        spec=spec,
        make_reader=make_reader(settings.reader, texts, model=settings.model),
        num_slots=slots_at(settings.residency, spec),
        answer_tokens=settings.answer_tokens,
        judged=settings.judged,
        seeds=settings.seeds,
        ends=eos_ids(model, tokenizer),
        measured={"source": source.name, "source_digest": source.digest},
    )
    save_profile(profile, settings.out)
    return profile


def format_profile(profile: TaskProfile) -> str:
    """A table for people: agreement with each layer restricted, and the answers' length."""
    layers = range(profile.spec.num_layers)
    rows = [
        [
            task,
            *(f"{agreement:.0%}" for agreement in profile.agreement_GL[place].tolist()),
            f"{profile.answer_tokens_G[place]:.0f}",
        ]
        for place, task in enumerate(profile.tasks)
    ]
    return format_table(["agreement", *(f"layer {layer}" for layer in layers), "W_o"], rows)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    settings = parse_cli(Settings, arguments)
    try:
        profile = run(settings)
    except (MoecastError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"{format_profile(profile)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
