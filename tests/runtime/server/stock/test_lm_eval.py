"""lm-eval's scores through the server are those that the resident model has."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tiny_moe import TINY_MOE_DIR
from tests.runtime.server.processes import MODEL, RunClient, ServerProcess

TASKS = Path(__file__).parent / "tasks"
ROUNDING = 1e-3  # of a sum of logarithms: other shapes are added up in another order
DOCS = [json.loads(line) for line in (TASKS / "texts.jsonl").read_text().splitlines()]


@pytest.fixture
def results(server: ServerProcess, run_client: RunClient, tmp_path: Path) -> Path:
    """The folder of what lm-eval wrote about all tasks."""
    where = f"base_url={server.address}/v1/completions"
    run_client(
        "lm_eval",
        "run",
        "--model=local-completions",
        f"--model_args=model={MODEL},{where},tokenizer={TINY_MOE_DIR},num_concurrent=4",
        "--include_path=.",
        "--tasks=moecast_choice,moecast_perplexity,moecast_continuation",
        "--log_samples",
        f"--output_path={tmp_path / 'results'}",
        cwd=TASKS,
    )
    return tmp_path / "results" / MODEL


def samples(results: Path, task: str) -> list[Any]:
    """What was asked and answered in ``task``, in the order of the texts."""
    (file,) = results.glob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(sample["doc_id"] for sample in found) == list(range(len(DOCS)))
    return sorted(found, key=lambda sample: int(sample["doc_id"]))


def log_likelihood(model: Any, context_ids: list[int], next_ids: list[int]) -> tuple[float, bool]:
    """Of ``next_ids`` in one forward pass, and whether greedy decoding would say them."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([context_ids + next_ids])).logits[0]
    logprobs_TV = logits_TV[len(context_ids) - 1 : -1].log_softmax(-1)
    found_T = logprobs_TV[range(len(next_ids)), next_ids]
    return float(found_T.sum()), logprobs_TV.argmax(-1).tolist() == next_ids


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """As lm-eval makes them: by default it asks for no special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def test_scores_and_texts_are_the_resident_models(
    results: Path, model: Any, tokenizer: Any
) -> None:
    """One run of lm-eval for all three kinds of tasks, since its start takes longest."""
    (file,) = results.glob("results_*.json")
    scores = json.loads(file.read_text())["results"]
    accuracy = check_choices(samples(results, "moecast_choice"), model, tokenizer)
    assert scores["moecast_choice"]["acc,none"] == pytest.approx(accuracy)
    perplexity = check_perplexity(samples(results, "moecast_perplexity"), model, tokenizer)
    found = scores["moecast_perplexity"]["byte_perplexity,none"]
    assert found == pytest.approx(perplexity, rel=1e-4)
    check_continuations(samples(results, "moecast_continuation"), model, tokenizer)


def check_choices(said: list[Any], model: Any, tokenizer: Any) -> float:
    """Each end has the log-likelihood that the model gives it; the share of right choices."""
    kinds, num_right = set(), 0
    for doc, sample in zip(DOCS, said, strict=True):
        context_ids = ids_of(tokenizer, doc["text"])
        expected = []
        for end, ((likelihood, is_greedy),) in zip(doc["ends"], sample["resps"], strict=True):
            next_ids = ids_of(tokenizer, doc["text"] + end)[len(context_ids) :]
            wanted, wanted_greedy = log_likelihood(model, context_ids, next_ids)
            assert float(likelihood) == pytest.approx(wanted, abs=ROUNDING)
            assert is_greedy == str(wanted_greedy)
            kinds.add(wanted_greedy)
            expected.append(wanted)
        num_right += expected.index(max(expected)) == doc["best"]
    assert kinds == {True, False}
    assert 0 < num_right < len(DOCS)
    return num_right / len(DOCS)


def check_perplexity(said: list[Any], model: Any, tokenizer: Any) -> float:
    """Each text has the log-likelihood that the model gives it; the perplexity of a byte."""
    total = 0.0
    for doc, sample in zip(DOCS, said, strict=True):
        wanted, _ = log_likelihood(model, [tokenizer.bos_token_id], ids_of(tokenizer, doc["text"]))
        assert float(sample["resps"][0][0]) == pytest.approx(wanted, abs=ROUNDING)
        total += wanted
    return math.exp(-total / sum(len(doc["text"].encode()) for doc in DOCS))


def check_continuations(said: list[Any], model: Any, tokenizer: Any) -> None:
    """Each text goes on as `generate` lets it, up to the task's stop string."""
    kinds = set()
    for doc, sample in zip(DOCS, said, strict=True):
        ids = ids_of(tokenizer, doc["text"])
        answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True)
        assert sample["resps"] == [[text.split("\n\n")[0]]]
        kinds.add("\n\n" in text)
    assert kinds == {True, False}
