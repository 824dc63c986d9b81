"""Which task a prompt is: what eMoE knows of a request before it runs.

`TaskReader` is the interface; `KeywordReader` counts words, as the paper does, and
`predictors.task_classifier.ClassifierReader` reads an embedding. Both are learned from prompts
whose task is known.

Not to be confused with `predictors.task`, which tells what requests use from those before them.

Shape letters: G tasks.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

_WORD = re.compile(r"[^\W\d_]+")
_MIN_PROMPTS = 3  # that have a word, before it says anything


class TaskReader(ABC):
    """Names the task of a prompt: `read`; and what it learned, as plain values and tensors.

    Attributes:
        kind: Names the class in a saved profile.
        tasks: The G tasks that it knows, in the order of the profile's rows.
    """

    kind: ClassVar[str]
    tasks: tuple[str, ...]

    @abstractmethod
    def read(self, prompt: str) -> int:
        """The place of the prompt's task in `tasks`; every prompt has one."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values, but for tensors and an embedder."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What was learned beside them."""
        return {}


class KeywordReader(TaskReader):
    """The task of which most keywords stand in a prompt.

    Source: eMoE §3.2.1, which counts matches of a list per task; the highest count wins. Its lists
    are not given: here they are learned (`fit`), so that both readers know the same prompts. A
    keyword counts once, however often it stands there: long prompts repeat everybody's. Ties, and
    prompts without any keyword, of which the paper says nothing, are of the ``fallback`` task; the
    one that tolerates least is the safe choice.

    Args:
        keywords: Of each task, lower case; a word may be of one task only.
        fallback: See above; one of the tasks.

    Raises:
        ValueError: There are no tasks, a word is of two, or ``fallback`` is none of them.
    """

    kind: ClassVar[str] = "keywords"

    def __init__(self, *, keywords: Mapping[str, Sequence[str]], fallback: str) -> None:
        if fallback not in keywords:
            raise ValueError(f"fallback={fallback!r}: must be one of {sorted(keywords)}")
        self.tasks = tuple(sorted(keywords))  # a JSON object has no order
        self.keywords = {task: tuple(keywords[task]) for task in self.tasks}
        self.fallback = fallback
        self._task_of_word: dict[str, int] = {}
        for place, (task, words) in enumerate(self.keywords.items()):
            for word in words:
                if word in self._task_of_word:
                    other = self.tasks[self._task_of_word[word]]
                    raise ValueError(f"keyword {word!r} is of the tasks {other!r} and {task!r}")
                self._task_of_word[word] = place

    @classmethod
    def fit(
        cls, prompts: Mapping[str, Sequence[str]], *, fallback: str, num_words: int = 8
    ) -> Self:
        """Learn the words that tell a task's prompts from the others'.

        A word is of the task whose prompts have it most often, by share; the ``num_words`` whose
        share exceeds that among the other tasks' prompts most are kept. Few are better than many
        (`benchmarks.request_tasks`), and people can read and mend the lists.

        Args:
            prompts: Of each task.
            fallback: As of the class.
            num_words: Of a task at most.

        Raises:
            ValueError: A task has no prompts, or ``num_words`` is below 1.
        """
        if num_words < 1:
            raise ValueError(f"num_words={num_words}: must be at least 1")
        if empty := [task for task, texts in prompts.items() if not texts]:
            raise ValueError(f"tasks {empty} have no prompts to learn keywords from")
        found = [
            Counter(w for text in texts for w in set(_words(text))) for texts in prompts.values()
        ]
        sizes_G = np.array([len(texts) for texts in prompts.values()])
        ranked: dict[str, list[tuple[float, str]]] = {task: [] for task in prompts}
        for word in sorted({word for counts in found for word in counts}):
            counts_G = np.array([counts[word] for counts in found])
            if counts_G.sum() < _MIN_PROMPTS:
                continue
            best = int((counts_G / sizes_G).argmax())
            elsewhere = (counts_G.sum() - counts_G[best]) / max(1, sizes_G.sum() - sizes_G[best])
            excess = counts_G[best] / sizes_G[best] - elsewhere
            if excess > 0:
                ranked[list(prompts)[best]].append((-excess, word))
        keywords = {task: [word for _, word in sorted(r)[:num_words]] for task, r in ranked.items()}
        return cls(keywords=keywords, fallback=fallback)

    def read(self, prompt: str) -> int:
        """As `TaskReader.read`."""
        counts = [0] * len(self.tasks)
        for word in set(_words(prompt)):
            if (task := self._task_of_word.get(word)) is not None:
                counts[task] += 1
        most = max(counts)
        if counts.count(most) > 1:
            return self.tasks.index(self.fallback)
        return counts.index(most)

    def config(self) -> dict[str, Any]:
        """The keywords and the fallback."""
        return {
            "keywords": {task: list(words) for task, words in self.keywords.items()},
            "fallback": self.fallback,
        }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
