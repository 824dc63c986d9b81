"""Which approximate index a set of vectors gets: measured on the vectors themselves.

How well cells or graphs work depends on the data (on independent Gaussian vectors neither does), so
nothing is assumed. Each candidate is built on a sample, its effort is raised until it finds the
nearest vector often enough, and what one query then takes is measured. The fastest wins. Knows
nothing of threads or files.

Sample, cells and the sample's graphs are the same for the same vectors and seed; what a query takes
is the clock's word, so two machines may choose differently. The choice is kept with the index.

Shape letters: S embedding · N vectors · B queries.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from predictors.index_kinds import Exact, Hnsw, Ivf, Kind, Numbers, Vectors, one_thread

logger = logging.getLogger(__name__)

_SAMPLE = 50_000
_QUERIES = 500  # the standard error of a recall of 0.95 is 0.01 then
_TIMED = 200
_BATCH = 4096
_CELLS_PER_SQRT = 4.0  # a search reads centres and cells, and about this balances the two
_TRAINED_PER_CELL = 40  # of k-means, FAISS's own lower bound
_SAME = 1e-6  # products this close are the same vector's, or as good

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to build an index.

    Attributes:
        kind: "ivf" or "hnsw".
        num_links: Of a "hnsw" node.
    """

    kind: str
    num_links: int = 0

    def num_trained(self, num_vectors: int) -> int:
        """How many of ``num_vectors`` vectors `empty` wants to see."""
        wanted = 1 if self.kind == "hnsw" else _TRAINED_PER_CELL * _num_cells(num_vectors)
        return min(wanted, num_vectors)

    def empty(self, trained_NS: Vectors, *, num_vectors: int, seed: int) -> Kind:
        """An index for ``num_vectors`` vectors like these, with nothing in it yet."""
        if self.kind == "hnsw":
            return Hnsw(trained_NS.shape[1], num_links=self.num_links)
        num_cells = min(_num_cells(num_vectors), max(1, len(trained_NS) // _TRAINED_PER_CELL))
        return Ivf.trained(trained_NS, num_cells=num_cells, seed=seed)


# With 16 links, a graph of 10^6 vectors found 0.89 of the nearest at an effort of 512.
CANDIDATES = (Candidate("ivf"), Candidate("hnsw", num_links=32))


@dataclass(frozen=True, slots=True)
class Measured:
    """What a candidate was seen to do.

    Attributes:
        candidate: The way it was built.
        num_vectors: How many it held.
        effort: The least of `Kind.settings` that reached the wanted recall, or the greatest.
        recall: Share of held-out queries whose nearest vector it found.
        query_s: Median time of one query.
        build_s: Time to build it.
    """

    candidate: Candidate
    num_vectors: int
    effort: int
    recall: float
    query_s: float
    build_s: float

    def __str__(self) -> str:
        """One line for a log."""
        links = f" with {self.candidate.num_links} links" if self.candidate.num_links else ""
        return (
            f"{self.candidate.kind}{links} over {self.num_vectors}: effort {self.effort}, recall@1 "
            f"{self.recall:.3f}, {1e3 * self.query_s:.3f} ms a query, built in {self.build_s:.1f} s"
        )


def choose(
    source: Kind,
    *,
    min_recall: float,
    seed: int,
    candidates: Sequence[Candidate] = CANDIDATES,
    clock: Clock = time.perf_counter,
) -> tuple[Measured, list[Measured]]:
    """Measure each candidate on a sample, and pick one.

    Args:
        source: What holds the vectors; at least two of them.
        min_recall: Recall@1 against exact search that a candidate has to reach.
        seed: Of the sample and of k-means.
        candidates: What takes part.
        clock: Tells seconds.

    Returns:
        The fastest of those that reach ``min_recall``, else the one that comes nearest to it; and
        all that were measured.
    """
    rng = np.random.default_rng(seed)
    num_queries = min(_QUERIES, len(source) // 2)
    drawn_N = rng.permutation(len(source))[: min(_SAMPLE, len(source) - num_queries) + num_queries]
    queries_BS = source.vectors(drawn_N[:num_queries])
    sample_NS = source.vectors(drawn_N[num_queries:])
    truth = Exact(sample_NS.shape[1])
    truth.put(np.arange(len(sample_NS)), sample_NS)
    best_B = truth.search(queries_BS, 1)[0][:, 0]
    measured = []
    for candidate in candidates:
        with one_thread():  # with several, FAISS links a graph's nodes in the order they come
            start_s = clock()
            trained_NS = sample_NS[: candidate.num_trained(len(sample_NS))]
            index = candidate.empty(trained_NS, num_vectors=len(sample_NS), seed=seed)
            index.put(np.arange(len(sample_NS)), sample_NS)
            build_s = clock() - start_s
            recall = set_effort(index, truth, queries_BS, best_B, min_recall=min_recall)
            query_s = time_query(index, queries_BS, clock=clock)
        found = Measured(candidate, len(index), index.effort, recall, query_s, build_s)
        logger.info("candidate %s", found)
        measured.append(found)
    good = [found for found in measured if found.recall >= min_recall]
    if good:
        best = min(good, key=lambda found: found.query_s)
    else:
        best = max(measured, key=lambda found: found.recall)
        logger.warning("no index finds %.3f of the nearest vectors: %s", min_recall, best)
    return best, measured


def build(
    source: Kind, candidate: Candidate, *, min_recall: float, seed: int, clock: Clock
) -> tuple[Kind, Measured]:
    """Move all vectors to an index of the candidate's kind, and set its effort at full size.

    Vectors are moved a few thousand at a time. Some are kept back until the others are in: they are
    the queries that the effort is found with, as a stored vector would find itself.

    Args:
        source: What holds the vectors; only read.
        candidate: Which index.
        min_recall: Recall@1 against exact search.
        seed: Of the order and of k-means.
        clock: Tells seconds.

    Returns:
        The index, and what it does. A recall below ``min_recall`` is logged as a warning.
    """
    start_s = clock()
    order_N = np.random.default_rng(seed).permutation(len(source))
    num_queries = min(_QUERIES, len(source) // 2)
    trained_N = order_N[num_queries:][: candidate.num_trained(len(source))]
    index = candidate.empty(source.vectors(trained_N), num_vectors=len(source), seed=seed)
    kept_back_N, moved_N = order_N[:num_queries], np.sort(order_N[num_queries:])
    with tqdm(total=len(source), desc=candidate.kind, unit="vector", disable=None) as progress:
        for numbers_N in _batches(moved_N):
            index.put(numbers_N, source.vectors(numbers_N))
            progress.update(len(numbers_N))
        queries_BS = source.vectors(kept_back_N)
        best_B = _best_but(source, queries_BS, kept_back_N)
        recall = set_effort(index, source, queries_BS, best_B, min_recall=min_recall)
        query_s = time_query(index, queries_BS, clock=clock)
        index.put(kept_back_N, queries_BS)
        progress.update(len(kept_back_N))
    measured = Measured(candidate, len(index), index.effort, recall, query_s, clock() - start_s)
    level = logging.INFO if recall >= min_recall else logging.WARNING
    logger.log(level, "built %s (wanted recall: %.3f)", measured, min_recall)
    return index, measured


def set_effort(
    index: Kind, source: Kind, queries_BS: Vectors, best_B: Vectors, *, min_recall: float
) -> float:
    """Set the least effort that finds the nearest vector often enough; the greatest if none does.

    Args:
        index: Changed.
        source: Holds the same vectors under the same numbers, float32.
        queries_BS: What to search for.
        best_B: The largest product of each query.
        min_recall: In [0, 1].

    Returns:
        The recall@1 at that effort. Where several vectors are equally near, each of them counts.
        It is above ``min_recall`` by two standard errors where it can be: the queries are a sample.
    """
    error = math.sqrt(min_recall * (1 - min_recall) / len(queries_BS))
    wanted, recall = min(1.0, min_recall + 2 * error), 0.0
    for effort in index.settings:
        index.effort = effort
        numbers_B = index.search(queries_BS, 1)[1][:, 0]
        found_B = numbers_B >= 0
        # What was found is compared by its true product: an index may keep vectors rounded.
        products_B = np.full(len(queries_BS), -np.inf)
        products_B[found_B] = np.einsum(
            "bs,bs->b", queries_BS[found_B], source.vectors(numbers_B[found_B])
        )
        recall = float((products_B >= best_B - _SAME).mean())
        if recall >= wanted:
            break
    return recall


def time_query(index: Kind, queries_BS: Vectors, *, clock: Clock = time.perf_counter) -> float:
    """Median seconds of one query, searched alone."""
    took_s = []
    for row in range(min(_TIMED, len(queries_BS))):
        start_s = clock()
        index.search(queries_BS[row : row + 1], 1)
        took_s.append(clock() - start_s)
    return float(np.median(took_s))


def _num_cells(num_vectors: int) -> int:
    return max(1, round(_CELLS_PER_SQRT * math.sqrt(num_vectors)))


def _best_but(source: Kind, queries_BS: Vectors, left_out_B: Numbers) -> Vectors:
    """The largest product of each query with a vector that is none of the queries themselves."""
    best_B = np.full(len(queries_BS), -np.inf, np.float32)
    for numbers_N in _batches(np.setdiff1d(np.arange(len(source)), left_out_B)):
        products_BN = queries_BS @ source.vectors(numbers_N).T
        np.maximum(best_B, products_BN.max(axis=1), out=best_B)
    return best_B


def _batches(numbers_N: Numbers) -> Iterator[Numbers]:
    for start in range(0, len(numbers_N), _BATCH):
        yield numbers_N[start : start + _BATCH]
