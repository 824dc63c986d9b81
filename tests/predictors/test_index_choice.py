import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from predictors.index_choice import CANDIDATES, Candidate, build, choose
from predictors.index_kinds import Exact, Hnsw, Ivf, Kind

DIM = 16
IVF, HNSW = Candidate("ivf"), Candidate("hnsw", num_links=16)


def stored(num_vectors: int = 2000, num_clusters: int = 40) -> Kind:
    rng = np.random.default_rng(0)
    centres_NS = rng.normal(size=(num_clusters, DIM))
    vectors_NS = centres_NS[rng.integers(0, num_clusters, num_vectors)]
    vectors_NS = (vectors_NS + 0.6 * rng.normal(size=(num_vectors, DIM))).astype(np.float32)
    exact = Exact(DIM)
    exact.put(np.arange(num_vectors), vectors_NS)
    return exact


def counting() -> Callable[[], float]:
    """A clock by which everything takes one second."""
    return itertools.count().__next__


def clock_for(seconds_of_candidate: list[float]) -> Callable[[], float]:
    """A clock by which a query of the n-th candidate takes that long, and so does its building."""

    def ticks() -> Iterator[float]:
        now = 0.0
        for seconds in seconds_of_candidate:
            for _ in range(1 + 200):
                yield now
                now += seconds
                yield now

    return ticks().__next__


def test_the_fastest_of_those_that_find_enough_is_chosen() -> None:
    for seconds, kind in (([1.0, 2.0], "ivf"), ([2.0, 1.0], "hnsw")):
        best, measured = choose(
            stored(), min_recall=0.9, seed=0, candidates=[IVF, HNSW], clock=clock_for(seconds)
        )
        assert best.candidate.kind == kind
        assert [found.query_s for found in measured] == pytest.approx(seconds)
        assert min(found.recall for found in measured) >= 0.9


def test_a_fast_candidate_that_finds_too_little_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ivf, "settings", (1,))
    best, measured = choose(
        stored(), min_recall=0.93, seed=0, candidates=[IVF, HNSW], clock=clock_for([1.0, 9.0])
    )
    assert measured[0].recall < 0.93 <= measured[1].recall
    assert best is measured[1]


def test_if_none_finds_enough_the_best_is_taken_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Ivf, "settings", (1,))
    monkeypatch.setattr(Hnsw, "settings", (1,))
    best, measured = choose(stored(), min_recall=0.999, seed=0, candidates=[IVF, HNSW])
    assert best.recall == max(found.recall for found in measured) < 0.999
    assert "no index finds 0.999 of the nearest vectors" in caplog.text


def test_the_same_vectors_seed_and_times_give_the_same_choice() -> None:
    one, other = (choose(stored(), min_recall=0.95, seed=3, clock=counting()) for _ in range(2))
    assert one == other
    assert [found.candidate for found in one[1]] == list(CANDIDATES)


def test_effort_is_the_least_that_finds_enough() -> None:
    efforts = {}
    for min_recall in (0.5, 0.95):
        _, (found,) = choose(stored(4000), min_recall=min_recall, seed=0, candidates=[IVF])
        efforts[min_recall] = found.effort
        assert found.recall >= min_recall
    assert efforts[0.5] < efforts[0.95]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_building_moves_every_vector_under_its_number(candidate: Candidate) -> None:
    exact = stored(5000)
    index, measured = build(exact, candidate, min_recall=0.9, seed=0, clock=counting())
    numbers_N = np.arange(5000)
    assert (len(index), measured.num_vectors) == (5000, 5000)
    assert index.vectors(numbers_N) == pytest.approx(exact.vectors(numbers_N), rel=1e-3, abs=1e-3)
    assert index.effort == measured.effort


def test_recall_is_not_measured_with_vectors_that_find_themselves() -> None:
    """500 of the vectors are queries, and in the index only after they were asked for.

    In 2000 independent Gaussian vectors one cell of 100 holds the nearest other one seldom, and
    always the vector itself: whoever let them find themselves would stop at an effort of 1.
    """
    exact = Exact(DIM)
    exact.put(np.arange(2000), np.random.default_rng(0).normal(size=(2000, DIM)).astype(np.float32))
    index, measured = build(exact, IVF, min_recall=0.9, seed=0, clock=counting())
    assert measured.effort > 4
    index.effort = 1
    own_N = index.search(exact.vectors(np.arange(2000)), 1)[1][:, 0]
    assert (own_N == np.arange(2000)).mean() > 0.5


def test_two_vectors_are_enough() -> None:
    index, _ = build(stored(2), HNSW, min_recall=0.9, seed=0, clock=counting())
    assert len(index) == 2
