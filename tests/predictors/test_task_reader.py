"""A prompt's task is read by the words that tell tasks apart, or by its embedding."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from predictors.embedders.base import Embedder
from predictors.task_classifier import ClassifierReader
from predictors.task_reader import KeywordReader, TaskReader

PROMPTS = {
    "summary": [f"Summarise the article about {x}" for x in ("war", "rain", "cats", "tax")],
    "code": [f"def {x}(): return the answer" for x in ("sort", "war", "add", "mul")],
    "chat": [f"hello, I would like {x} please" for x in ("rain", "tea", "cats", "a room")],
}
KEYWORDS = {"summary": ["article", "summarise"], "code": ["def", "return"], "chat": ["please"]}


class Letters(Embedder):
    """How often each letter stands in a text, of length 1."""

    kind = "letters"
    dim = 26
    fingerprint = "letters"

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        rows_NS = np.array(
            [[t.lower().count(chr(97 + s)) for s in range(26)] for t in texts], float
        )
        lengths_N1 = np.linalg.norm(rows_NS, axis=1, keepdims=True)
        return (rows_NS / np.maximum(lengths_N1, 1e-9)).astype(np.float32)

    def config(self) -> dict[str, Any]:
        return {}


def read(reader: TaskReader, prompt: str) -> str:
    return reader.tasks[reader.read(prompt)]


def test_the_task_with_most_keywords_wins_and_a_repeated_one_counts_once() -> None:
    reader = KeywordReader(keywords=KEYWORDS, fallback="chat")
    assert read(reader, "Summarise this ARTICLE, please.") == "summary"
    assert read(reader, "please, please, please: def f(): return 1") == "code"


@pytest.mark.parametrize("prompt", ["nothing known", "", "article return"])
def test_a_prompt_that_keywords_do_not_decide_is_of_the_fallback_task(prompt: str) -> None:
    assert read(KeywordReader(keywords=KEYWORDS, fallback="code"), prompt) == "code"
    assert read(KeywordReader(keywords=KEYWORDS, fallback="chat"), prompt) == "chat"


def test_learned_keywords_are_those_that_other_tasks_lack() -> None:
    reader = KeywordReader.fit(PROMPTS, fallback="chat", num_words=2)
    assert set(reader.keywords["summary"]) == {"about", "article"}  # of equals the first
    assert set(reader.keywords["code"]) == {"answer", "def"}
    everything = KeywordReader.fit(PROMPTS, fallback="chat", num_words=99)
    words = {word for words in everything.keywords.values() for word in words}
    assert "war" not in words  # it stands in two prompts only
    assert "the" in everything.keywords["summary"]
    assert len(words) == sum(len(found) for found in everything.keywords.values())


def test_a_word_that_all_tasks_have_alike_is_no_keyword() -> None:
    same = {"a": ["now left"] * 3, "b": ["now right"] * 3}
    assert KeywordReader.fit(same, fallback="a").keywords == {"a": ("left",), "b": ("right",)}


def test_keywords_survive_being_written_down() -> None:
    reader = KeywordReader.fit(PROMPTS, fallback="chat")
    again = KeywordReader(**json.loads(json.dumps(reader.config(), sort_keys=True)))
    assert again.tasks == reader.tasks == ("chat", "code", "summary")
    assert [again.read(p) for p in PROMPTS["summary"]] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("keywords", "fallback", "message"),
    [
        (KEYWORDS, "poem", "fallback='poem': must be one of"),
        ({"a": ["x"], "b": ["x"]}, "a", "keyword 'x' is of the tasks 'a' and 'b'"),
    ],
)
def test_keywords_that_cannot_decide_are_refused(
    keywords: Any, fallback: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KeywordReader(keywords=keywords, fallback=fallback)


def test_nothing_is_learned_from_nothing() -> None:
    with pytest.raises(ValueError, match=r"tasks \['b'\]"):
        KeywordReader.fit({"a": ["x"], "b": []}, fallback="a")
    with pytest.raises(ValueError, match="num_words=0"):
        KeywordReader.fit(PROMPTS, fallback="chat", num_words=0)
    with pytest.raises(ValueError, match=r"tasks \['b'\]"):
        ClassifierReader.fit({"a": ["x"], "b": []}, embedder=Letters())
    with pytest.raises(ValueError, match="weight_decay=-1"):
        ClassifierReader.fit(PROMPTS, embedder=Letters(), weight_decay=-1)


def test_the_classifier_reads_prompts_like_those_that_it_learned_from() -> None:
    reader = ClassifierReader.fit(PROMPTS, embedder=Letters())
    assert read(reader, "Summarise the article about birds") == "summary"
    assert read(reader, "def div(): return the answer") == "code"
    assert read(reader, "hello, I would like coffee please") == "chat"


def test_a_task_with_few_prompts_is_not_drowned_by_one_with_many() -> None:
    """Two kinds of prompt that look alike: with as much weight each, half goes to each."""
    same = {"rare": ["ab"], "common": ["ab"] * 50}
    reader = ClassifierReader.fit(same, embedder=Letters())
    bias_rare, bias_common = reader.tensors()["bias_G"]
    assert bias_rare == pytest.approx(float(bias_common), abs=1e-3)


def test_the_classifier_survives_being_written_down() -> None:
    reader = ClassifierReader.fit(PROMPTS, embedder=Letters())
    again = ClassifierReader(**reader.config(), **reader.tensors(), embedder=Letters())
    assert [again.read(p) for p in PROMPTS["chat"]] == [2, 2, 2, 2]


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[1, 26\] and \[1\]"):
        ClassifierReader(
            tasks=["a"], embedder=Letters(), weights_GS=torch.zeros(1, 3), bias_G=torch.zeros(1)
        )
