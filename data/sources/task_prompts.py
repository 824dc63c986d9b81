"""Real prompts by what they ask for: topic = task, in eMoE's sense (Table 1), not subject.

Which public set is which task is written down here and nowhere else. eMoE's five are summarising,
classifying, answering questions, comparing and conversing. No set here compares texts; two more
kinds of request that people send to servers stand in: writing from given facts, and code. Dialogues
have their speakers' roles in them, as chat templates write them, too.

Knows nothing of how a task is recognised.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from data.schema import Prompt
from data.sources.base import PromptSource
from data.sources.shared_prompts import SharedPrompts

# (set, topic within it or None for all of it) -> task
TASK_OF: Mapping[tuple[str, str | None], str] = MappingProxyType(
    {
        ("p3_t0_ship", "cnn_dailymail"): "summary",
        ("p3_t0_ship", "amazon_polarity"): "classification",
        ("p3_t0_ship", "dbpedia_14"): "classification",
        ("p3_t0_ship", "adversarial_qa"): "question",
        ("p3_t0_ship", "cosmos_qa"): "question",
        ("p3_t0_ship", "kilt_tasks_hotpotqa"): "question",
        ("p3_t0_ship", "qasc"): "question",
        ("p3_t0_ship", "quarel"): "question",
        ("p3_t0_ship", "quartz"): "question",
        ("p3_t0_ship", "ropes"): "question",
        ("p3_t0_ship", "wiki_hop"): "question",
        ("p3_t0_ship", "common_gen"): "writing",
        ("p3_t0_ship", "wiki_bio"): "writing",
        ("sgd_train_4000", None): "conversation",
        ("humaneval", None): "code",
    }
)


class TaskPrompts(PromptSource):
    """Prompts of six tasks, of the folder MOECAST_DATA, evenly many of each as far as there are.

    Args:
        num_prompts: How many prompts; None means all.

    Raises:
        ValueError: ``num_prompts`` is below 1, or the folder is not there.
    """

    def __init__(self, *, num_prompts: int | None = None) -> None:
        self._sets = [SharedPrompts(name=name) for name in sorted({name for name, _ in TASK_OF})]
        super().__init__(name="task_prompts", num_prompts=num_prompts)

    def read(self) -> Iterator[Prompt]:
        """Yield each prompt whose task is known, with the task as its topic."""
        for source in self._sets:
            for prompt in source.read():
                task = TASK_OF.get((source.name, prompt.topic), TASK_OF.get((source.name, None)))
                if task is not None:
                    name = f"{source.name}/{prompt.topic}/{prompt.request_id}"
                    yield dataclasses.replace(prompt, request_id=name, topic=task)


def set_of(prompt: Prompt) -> str:
    """The public set, and topic within it, that a prompt of `TaskPrompts` is from."""
    return "/".join(prompt.request_id.split("/")[:2])
