from pathlib import Path

import faiss
import numpy as np
import pytest

from data.errors import DamagedFileError
from predictors.index import VectorIndex


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


@pytest.mark.parametrize("shape", [(3, 7), (8,)])
def test_vectors_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 8\]"):
        filled()[0].add(np.zeros(shape, np.float32))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        VectorIndex(dim=0)
    with pytest.raises(ValueError, match="num_neighbours=0"):
        filled()[0].search(np.zeros((1, 8), np.float32), 0)
