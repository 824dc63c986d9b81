"""The readers are judged on what they were not fitted on."""

from collections.abc import Mapping, Sequence

import pytest

from benchmarks.request_tasks import (
    Options,
    Remembered,
    accuracy,
    held_out_requests,
    held_out_sets,
    of_task,
    run,
)
from data.schema import Prompt
from predictors.task_reader import KeywordReader, TaskReader
from tests.predictors.test_task_reader import Letters

WORDS = {"a": ("alpha", "beta"), "b": ("gamma", "delta")}


def prompts() -> list[Prompt]:
    """Two tasks of two sets each; a set's prompts share a word that no other set has."""
    return [
        Prompt(request_id=f"file/{task}{s}/{i}", topic=task, text=f"{word} number {i}")
        for task, words in WORDS.items()
        for s, word in enumerate(words)
        for i in range(10)
    ]


def keywords(texts: Mapping[str, Sequence[str]]) -> TaskReader:
    return KeywordReader.fit(texts, fallback="b", num_words=2)


def test_held_out_requests_of_known_wording_are_read_right() -> None:
    found = held_out_requests(keywords, prompts(), seed=0)
    assert found["num_judged"] == 8
    assert found["accuracy"] == 1.0
    assert found["accuracy_of_task"] == {"a": 1.0, "b": 1.0}


def test_sets_of_unknown_wording_fall_back() -> None:
    assert held_out_sets(keywords, prompts()) == {
        "file/a0": 0.0,
        "file/a1": 0.0,
        "file/b0": 1.0,
        "file/b1": 1.0,
    }


def test_accuracy_is_the_share_read_right() -> None:
    reader = keywords(of_task(prompts()))
    asked = [Prompt(request_id="x", topic=t, text="alpha") for t in ("a", "a", "a", "b")]
    assert accuracy(reader, asked) == 0.75


def test_a_remembered_embedder_says_what_the_embedder_said() -> None:
    texts = ["one", "two"]
    remembered = Remembered(Letters(), texts)
    assert (remembered.embed(["two", "one", "two"])[::2] == Letters().embed(["two", "two"])).all()


def test_every_reader_gets_a_row_with_accuracy_and_time() -> None:
    options = Options(embedders=("token_mean",), seeds=1, fallback="b")
    result = run(options, prompts())
    assert [row["reader"] for row in result["rows"]] == ["keywords", "classifier on token_mean"]
    for row in result["rows"]:
        assert row["accuracy"] == pytest.approx(1.0)
        assert row["read_us"] > 0
        assert len(row["sets"]) == 4
