"""The predictors on real routing: gpt-oss-20b decoding MMLU questions."""

from dataclasses import replace
from pathlib import Path

import pytest

from data.importers import load_traces
from data.schema import TraceList
from predictors.base import Predictor
from predictors.metrics import evaluate_recall
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.semantic import Semantic
from tests.predictors.fakes import WordEmbedder


@pytest.fixture(scope="module")
def traces(shared_data: Path) -> TraceList:
    """Every sixth request, split by topic as the whole set is."""
    whole = load_traces("gptoss20b")
    assert isinstance(whole, TraceList)
    return replace(whole, traces=whole.traces[::6])


def recall(predictor: Predictor, traces: TraceList) -> float:
    predictor.fit(traces)
    return evaluate_recall(predictor, traces, max_tokens=2000).recall


def test_previous_token_overlap_is_the_published_one(traces: TraceList) -> None:
    """The data's own description says 0.43 over all tokens."""
    assert recall(PreviousToken(), traces) == pytest.approx(0.43, abs=0.03)


def test_semantic_beats_both_baselines_on_subjects_it_never_saw(traces: TraceList) -> None:
    """Even where its embedder knows no word of the prompts."""
    semantic = recall(Semantic(embedder=WordEmbedder()), traces)
    previous, popularity = recall(PreviousToken(), traces), recall(Popularity(), traces)
    assert popularity < previous < semantic - 0.1
