"""Telling the task of a request: keywords (eMoE's way) against classifiers, accuracy and time.

    python -m benchmarks.request_tasks                    # needs the folder MOECAST_DATA

Two questions, since a task's prompts are alike in their set's wording:

- requests held out: fitted on some prompts of every set, judged on others;
- sets held out: of each task that has several sets, one is left out when fitting and judged alone
  ("wordings that nobody has seen"); mean over those sets.

Time: one prompt at a time, median over those judged. Ends with one line of JSON.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.options import as_json, parse_options
from benchmarks.record import record
from data.schema import Prompt
from data.sources.task_prompts import TaskPrompts, set_of
from data.splits import split_by_topic
from data.tables import format_table
from predictors.embedders.base import Embedder
from predictors.embedders.sentence import SentenceEmbedder
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.task_classifier import ClassifierReader
from predictors.task_reader import KeywordReader, TaskReader

FitReader = Callable[[Mapping[str, Sequence[str]]], TaskReader]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        num_prompts: Of all tasks; 70 % are fitted on, 20 % judged.
        num_words: Keywords of a task.
        fallback: The task of a prompt whose keywords do not decide.
        embedders: Of classifiers: "sentence", "token_mean".
        seeds: Splits.
        out: Where to keep the result, or "".
    """

    num_prompts: int = 900
    num_words: int = 8
    fallback: str = "conversation"
    embedders: tuple[str, ...] = ("token_mean", "sentence")
    seeds: int = 3
    out: str = ""


class Remembered(Embedder):
    """An embedder that has read all prompts before: splits and folds need not read them anew."""

    kind = "remembered"

    def __init__(self, inner: Embedder, texts: Sequence[str]) -> None:
        self.dim, self.fingerprint = inner.dim, inner.fingerprint
        self._row_of = dict(zip(texts, inner.embed(texts), strict=True))

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """What the embedder said."""
        return np.stack([self._row_of[text] for text in texts])

    def config(self) -> dict[str, Any]:
        """Nothing: it is never saved."""
        return {}


def of_task(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Texts by task."""
    found: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        found[prompt.topic].append(prompt.text)
    return dict(sorted(found.items()))


def accuracy(reader: TaskReader, prompts: Sequence[Prompt]) -> float:
    """Share of prompts whose task is read right."""
    right = [reader.tasks[reader.read(prompt.text)] == prompt.topic for prompt in prompts]
    return sum(right) / len(right)


def held_out_requests(fit: FitReader, prompts: Sequence[Prompt], *, seed: int) -> dict[str, Any]:
    """Accuracy on requests that were not fitted on, in all and of each task."""
    split = split_by_topic({p.request_id: p.topic for p in prompts}, seed=seed)
    reader = fit(of_task([p for p in prompts if split[p.request_id] == "fit"]))
    judged = [p for p in prompts if split[p.request_id] == "test"]
    tasks = sorted({p.topic for p in judged})
    return {
        "num_judged": len(judged),
        "accuracy": accuracy(reader, judged),
        "accuracy_of_task": {
            task: accuracy(reader, [p for p in judged if p.topic == task]) for task in tasks
        },
    }


def held_out_sets(fit: FitReader, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Accuracy on each set that was left out, of tasks that have others."""
    sets: dict[str, set[str]] = defaultdict(set)
    for prompt in prompts:
        if not set_of(prompt).startswith("sgd"):  # whose topics are subjects of one set
            sets[prompt.topic].add(set_of(prompt))
    found = {}
    for names in sets.values():
        for name in sorted(names) if len(names) > 1 else ():
            reader = fit(of_task([p for p in prompts if set_of(p) != name]))
            found[name] = accuracy(reader, [p for p in prompts if set_of(p) == name])
    return found


def microseconds(reader: TaskReader, prompts: Sequence[Prompt]) -> float:
    """Median time to read one prompt."""
    times_s = []
    for prompt in prompts:
        started_s = time.perf_counter()
        reader.read(prompt.text)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s) * 1e6


def run(options: Options, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A row for each reader."""

    def keywords(texts: Mapping[str, Sequence[str]]) -> TaskReader:
        return KeywordReader.fit(texts, fallback=options.fallback, num_words=options.num_words)

    timed = prompts[:60]
    ways: dict[str, tuple[FitReader, TaskReader]] = {
        "keywords": (keywords, keywords(of_task(prompts)))
    }
    makers: Mapping[str, Callable[[], Embedder]] = {
        "sentence": SentenceEmbedder,
        "token_mean": TokenMeanEmbedder,
    }
    for name in options.embedders:
        live = makers[name]()
        remembered = Remembered(live, [prompt.text for prompt in prompts])

        def classifier(
            texts: Mapping[str, Sequence[str]], embedder: Embedder = remembered
        ) -> TaskReader:
            return ClassifierReader.fit(texts, embedder=embedder)

        timed_texts = of_task(timed)
        ways[f"classifier on {name}"] = (
            classifier,
            ClassifierReader.fit(timed_texts, embedder=live),
        )
    rows = []
    for name, (fit, live_reader) in ways.items():
        folds = [held_out_requests(fit, prompts, seed=seed) for seed in range(options.seeds)]
        sets = held_out_sets(fit, prompts)
        rows.append(
            {
                "reader": name,
                "requests": folds,
                "accuracy": statistics.mean(fold["accuracy"] for fold in folds),
                "sets": sets,
                "accuracy_unseen_sets": statistics.mean(sets.values()) if sets else None,
                "read_us": microseconds(live_reader, timed),
            }
        )
    return {"num_prompts": len(prompts), "tasks": sorted({p.topic for p in prompts}), "rows": rows}


def main(arguments: Sequence[str]) -> None:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    prompts = list(TaskPrompts(num_prompts=options.num_prompts).prompts())
    result = run(options, prompts)
    table = [
        [
            row["reader"],
            f"{row['accuracy']:.1%}",
            f"{min(f['accuracy'] for f in row['requests']):.1%}",
            f"{row['accuracy_unseen_sets']:.1%}",
            f"{row['read_us']:.0f}",
        ]
        for row in result["rows"]
    ]
    print(format_table(["reader", "accuracy", "worst split", "unseen sets", "us a prompt"], table))
    out = Path(options.out) if options.out else None
    record("request_tasks", {"options": as_json(options), **result}, out=out)


if __name__ == "__main__":
    main(sys.argv[1:])
