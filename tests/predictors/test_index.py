import logging
import threading
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from data.errors import DamagedFileError
from predictors import index as index_module
from predictors.index import VectorIndex
from predictors.index_choice import Candidate

DIM = 16
LIMIT = 400  # in place of 10^5
IVF, HNSW = Candidate("ivf"), Candidate("hnsw", num_links=16)
KINDS = {"exact": None, "ivf": IVF, "hnsw": HNSW}


def clustered(num_vectors: int, seed: int = 0, num_clusters: int = 40) -> np.ndarray:
    """Unit vectors around 40 centres: something that an index can make use of."""
    centres_NS = np.random.default_rng(99).normal(size=(num_clusters, DIM))
    rng = np.random.default_rng(seed)
    vectors_NS = centres_NS[rng.integers(0, num_clusters, num_vectors)]
    vectors_NS = vectors_NS + 0.6 * rng.normal(size=(num_vectors, DIM))
    return (vectors_NS / np.linalg.norm(vectors_NS, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=KINDS)
def grown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VectorIndex:
    """1200 clustered vectors in each kind of index, its competitors kept from it."""
    if KINDS[request.param] is None:
        index = VectorIndex(dim=DIM)
    else:
        only = {"candidates": [KINDS[request.param]]}
        choose = index_module.choose
        monkeypatch.setattr(index_module, "choose", lambda *a, **k: choose(*a, **k, **only))
        index = VectorIndex(dim=DIM, exact_limit=LIMIT, min_recall=0.9)
    index.add(clustered(1200))
    assert index.kind == request.param
    return index


def filled(num_vectors: int = 20, dim: int = 8) -> tuple[VectorIndex, np.ndarray]:
    vectors_NS = np.random.default_rng(0).normal(size=(num_vectors, dim)).astype(np.float32)
    index = VectorIndex(dim=dim)
    index.add(vectors_NS)
    return index, vectors_NS


def test_search_agrees_with_brute_force() -> None:
    index, vectors_NS = filled()
    queries_BS = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    scores_BM, numbers_BM = index.search(queries_BS, 3)
    products_BN = queries_BS @ vectors_NS.T
    assert numbers_BM.tolist() == np.argsort(-products_BN, axis=1)[:, :3].tolist()
    assert scores_BM == pytest.approx(np.sort(products_BN, axis=1)[:, :-4:-1], rel=1e-5)


def test_missing_neighbours_are_minus_one_at_minus_infinity() -> None:
    index, vectors_NS = filled(num_vectors=2)
    scores_BM, numbers_BM = index.search(vectors_NS[:1], 4)
    assert numbers_BM[0, 2:].tolist() == [-1, -1]
    assert scores_BM[0, 2:].tolist() == [-np.inf, -np.inf]
    assert VectorIndex(dim=8).search(vectors_NS[:1], 1)[1].tolist() == [[-1]]


def test_saved_index_finds_the_same(tmp_path: Path) -> None:
    index, vectors_NS = filled()
    index.save(tmp_path / "index.faiss")
    again = VectorIndex.load(tmp_path / "index.faiss")
    assert (len(again), again.dim) == (20, 8)
    assert all(map(np.array_equal, again.search(vectors_NS, 5), index.search(vectors_NS, 5)))


@pytest.mark.parametrize("num_bytes", [0, 3, 30, -5])
def test_truncated_file_is_named(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "index.faiss"
    filled()[0].save(path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DamagedFileError, match=r"index\.faiss is damaged") as caught:
        VectorIndex.load(path)
    assert caught.value.path == path


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"index\.faiss"):
        VectorIndex.load(tmp_path / "index.faiss")


def test_another_kind_of_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    faiss.write_index(faiss.IndexFlatL2(4), str(path))
    with pytest.raises(DamagedFileError, match="IndexFlatL2"):
        VectorIndex.load(path)


def test_each_kind_finds_the_nearest_vector_of_unseen_queries(grown: VectorIndex) -> None:
    queries_BS = clustered(200, seed=5)
    truth_B = (queries_BS @ clustered(1200).T).argmax(axis=1)
    assert len(grown) == 1200
    assert (grown.search(queries_BS, 1)[1][:, 0] == truth_B).mean() >= 0.88
    if grown.choice is not None:
        assert (grown.choice.num_vectors, grown.choice.recall >= 0.9) == (1200, True)


def test_each_kind_numbers_vectors_in_the_order_they_were_added(grown: VectorIndex) -> None:
    """Also those that came after it was built, and those that were kept back as queries."""
    grown.add(clustered(100, seed=1))
    vectors_NS = np.concatenate([clustered(1200), clustered(100, seed=1)])
    products_BM, numbers_BM = grown.search(vectors_NS, 1)
    found = numbers_BM[:, 0] == np.arange(1300)
    assert found.mean() > 0.99
    assert products_BM[found, 0] == pytest.approx(1.0, abs=2e-3)


def test_each_kind_replaces_in_place(grown: VectorIndex) -> None:
    old_NS, new_NS = clustered(1200), clustered(30, seed=2)
    numbers_N = np.arange(7, 1200, 40)
    grown.replace(numbers_N, new_NS)
    assert len(grown) == 1200
    products_BM, found_BM = grown.search(new_NS, 1)
    assert (found_BM[:, 0] == numbers_N).mean() > 0.95
    # What was replaced is gone: nothing is at a product of 1 from it any more.
    products_BM, found_BM = grown.search(old_NS[numbers_N], 3)
    assert (products_BM < 0.999).all()
    assert (found_BM >= 0).all()
    # Its neighbours in the numbering are untouched.
    assert (grown.search(old_NS[numbers_N + 1], 1)[1][:, 0] == numbers_N + 1).mean() > 0.95


def test_each_kind_comes_back_from_disk_with_its_settings_and_can_go_on(
    grown: VectorIndex, tmp_path: Path
) -> None:
    grown.replace(np.arange(20), clustered(20, seed=3))
    grown.save(tmp_path / "index.faiss")
    again = VectorIndex.load(tmp_path / "index.faiss")
    assert (again.kind, len(again), again.dim) == (grown.kind, 1200, DIM)
    queries_BS = clustered(50, seed=4)
    assert all(map(np.array_equal, again.search(queries_BS, 3), grown.search(queries_BS, 3)))
    for index in (again, grown):
        index.replace(np.array([5]), queries_BS[:1])
        index.add(queries_BS[1:2])
        assert index.search(queries_BS[:2], 1)[1][:, 0].tolist() == [5, 1200]


@pytest.mark.parametrize("num_bytes", [10, 1000, -1])
def test_each_kind_is_named_where_its_file_is_truncated(
    grown: VectorIndex, tmp_path: Path, num_bytes: int
) -> None:
    path = tmp_path / "index.faiss"
    grown.save(path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DamagedFileError, match=r"index\.faiss is damaged"):
        VectorIndex.load(path)


def test_a_search_never_sees_half_of_a_replacement_or_an_addition(grown: VectorIndex) -> None:
    """A record is replaced by its negative and back, time and again, while two threads search.

    Whoever saw a vector taken out and not yet put back, or one half old and half new, would find
    neither of the two at a product of 1. New records arrive meanwhile, each far from all others.
    """
    place, probe_S = 11, np.zeros(DIM, np.float32)
    probe_S[0] = 3.0  # longer than all others: the nearest to itself by far
    grown.replace(np.array([place]), probe_S[None])
    both_BS = np.stack([probe_S, -probe_S])
    done, wrong, num_searches = threading.Event(), [], [0, 0]

    def search(thread: int) -> None:
        while not done.is_set():
            products_BM, numbers_BM = grown.search(both_BS, 1)
            here_B = (numbers_BM[:, 0] == place) & (np.abs(products_BM[:, 0] - 9.0) < 0.05)
            if here_B.sum() != 1:
                wrong.append((products_BM, numbers_BM))
            num_searches[thread] += 1

    threads = [threading.Thread(target=search, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(150):
            grown.replace(np.array([place]), both_BS[[(n + 1) % 2]])
            grown.add(clustered(2, seed=n))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert min(num_searches) > 5
    assert not wrong
    assert len(grown) == 1500


def test_searches_go_on_while_another_index_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    index = VectorIndex(dim=DIM, exact_limit=LIMIT)
    vectors_NS = clustered(LIMIT + 1)
    index.add(vectors_NS[:LIMIT])
    building, go_on = threading.Event(), threading.Event()
    choose = index_module.choose

    def slow_choose(*args: object, **options: object) -> object:
        building.set()
        assert go_on.wait(10)
        return choose(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(index_module, "choose", slow_choose)
    writer = threading.Thread(target=index.add, args=(vectors_NS[LIMIT:],))
    writer.start()
    assert building.wait(10)
    assert index.kind == "exact"
    assert index.search(vectors_NS[LIMIT:], 1)[1].tolist() == [[LIMIT]]
    go_on.set()
    writer.join()
    assert index.kind in ("ivf", "hnsw")
    assert index.search(vectors_NS[LIMIT:], 1)[1].tolist() == [[LIMIT]]


def test_search_is_exact_up_to_the_limit_and_the_choice_is_logged_beyond(
    caplog: pytest.LogCaptureFixture,
) -> None:
    index = VectorIndex(dim=DIM, exact_limit=LIMIT)
    with caplog.at_level(logging.INFO):
        index.add(clustered(LIMIT))
        assert (index.kind, caplog.text) == ("exact", "")
        index.add(clustered(1, seed=1))
    assert index.choice is not None
    assert index.kind == index.choice.candidate.kind
    assert "candidate ivf over" in caplog.text
    assert "candidate hnsw with 32 links over" in caplog.text
    assert f"built {index.choice}" in caplog.text


def count_builds(monkeypatch: pytest.MonkeyPatch, candidate: Candidate) -> Callable[[], int]:
    """How often an index was built; only one candidate takes part."""
    choose, calls = index_module.choose, []

    def counted(*args: object, **options: object) -> object:
        calls.append(args)
        return choose(*args, **options, candidates=[candidate])  # type: ignore[arg-type]

    monkeypatch.setattr(index_module, "choose", counted)
    return lambda: len(calls)


def test_an_outgrown_index_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    num_builds = count_builds(monkeypatch, IVF)
    index = VectorIndex(dim=DIM, exact_limit=LIMIT)
    vectors_NS = clustered(4 * (LIMIT + 1))
    counts = []
    for upto in (LIMIT, LIMIT + 1, 2 * LIMIT, 4 * LIMIT + 3, 4 * LIMIT + 4):
        index.add(vectors_NS[len(index) : upto])
        counts.append(num_builds())
    assert counts == [0, 1, 1, 1, 2]
    assert (index.search(vectors_NS, 1)[1][:, 0] == np.arange(len(vectors_NS))).mean() > 0.99


def test_a_graph_with_a_quarter_dead_is_built_anew_and_cells_need_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors_NS, others_NS = clustered(800), clustered(800, seed=1)
    builds = {}
    for candidate in (HNSW, IVF):
        num_builds = count_builds(monkeypatch, candidate)
        index = VectorIndex(dim=DIM, exact_limit=LIMIT)
        index.add(vectors_NS)
        for start in range(0, 800, 100):
            index.replace(np.arange(start, start + 100), others_NS[start : start + 100])
        builds[candidate.kind] = num_builds()
        monkeypatch.undo()
        found = index.search(others_NS, 1)[1][:, 0] == np.arange(800)
        assert found.mean() > 0.99
    # The first one, and one for each 300 of the 800 replaced: a quarter is 200, to be passed.
    assert builds == {"hnsw": 3, "ivf": 1}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 20], r"0\.\.20 to replace: must be in 0\.\.19"),
        ([-1, 3], r"-1\.\.3"),
        ([4, 4], "distinct"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_nothing_changes(
    numbers: list[int], message: str
) -> None:
    index, vectors_NS = filled()
    before = index.search(vectors_NS, 3)
    with pytest.raises(ValueError, match=message):
        index.replace(np.array(numbers), np.ones((2, 8), np.float32))
    with pytest.raises(ValueError, match=r"\(3,\) numbers for vectors of shape \(2, 8\)"):
        index.replace(np.arange(3), np.ones((2, 8), np.float32))
    assert all(map(np.array_equal, before, index.search(vectors_NS, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused(value: float) -> None:
    index, vectors_NS = filled()
    bad_NS = vectors_NS[:2].copy()
    bad_NS[1, 3] = value
    for use in (index.add, lambda bad: index.search(bad, 1)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            use(bad_NS)
    assert len(index) == 20


def test_a_graph_whose_links_lead_nowhere_is_refused(tmp_path: Path) -> None:
    """FAISS would read beyond its memory."""
    graph = faiss.IndexHNSWSQ(DIM, faiss.ScalarQuantizer.QT_fp16, 4, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexIDMap(graph)
    index.add_with_ids(clustered(50), np.arange(50))
    neighbours = faiss.vector_to_array(graph.hnsw.neighbors)
    neighbours[0] = 50
    faiss.copy_array_to_vector(neighbours, graph.hnsw.neighbors)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(DamagedFileError, match=r"index\.faiss"):
        VectorIndex.load(tmp_path / "index.faiss")


@pytest.mark.parametrize(
    ("number", "message"), [(2**60, "do not belong together"), (7, "not numbered 0, 1")]
)
def test_numbers_that_are_not_0_to_n_are_refused(tmp_path: Path, number: int, message: str) -> None:
    """One of them is far beyond the vectors, or comes twice."""
    float16 = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIDMap(faiss.IndexHNSWSQ(DIM, float16, 4, faiss.METRIC_INNER_PRODUCT))
    numbers_N = np.arange(50)
    numbers_N[3] = number
    index.add_with_ids(clustered(50), numbers_N)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(DamagedFileError, match=message):
        VectorIndex.load(tmp_path / "index.faiss")


@pytest.mark.parametrize("shape", [(3, 7), (8,)])
def test_vectors_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 8\]"):
        filled()[0].add(np.zeros(shape, np.float32))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        VectorIndex(dim=0)
    with pytest.raises(ValueError, match="exact_limit=0"):
        VectorIndex(dim=8, exact_limit=0)
    with pytest.raises(ValueError, match=r"min_recall=1\.5"):
        VectorIndex(dim=8, min_recall=1.5)
    with pytest.raises(ValueError, match="num_neighbours=0"):
        filled()[0].search(np.zeros((1, 8), np.float32), 0)
