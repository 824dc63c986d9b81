"""Prompts by task: evenly of each, and the same prompt has the same task everywhere."""

from collections import Counter
from pathlib import Path

import pytest

from data.sources.task_prompts import TASK_OF, TaskPrompts, set_of


@pytest.fixture(scope="module")
def source(shared_data: Path) -> TaskPrompts:
    return TaskPrompts(num_prompts=60)


def test_each_task_has_as_many_prompts(source: TaskPrompts) -> None:
    counts = Counter(prompt.topic for prompt in source.prompts())
    assert counts == dict.fromkeys(sorted(set(TASK_OF.values())), 10)


def test_a_prompt_says_which_set_it_is_from_and_has_that_sets_task(source: TaskPrompts) -> None:
    for prompt in source.prompts():
        name, topic = set_of(prompt).split("/")
        assert prompt.topic == TASK_OF.get((name, topic), TASK_OF.get((name, None)))
