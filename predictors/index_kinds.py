"""The three ways to search vectors that `predictors.index` offers, each a thin layer over FAISS.

All of them hold vectors by number, insert and replace, and find the largest inner products. None of
them knows of threads (`predictors.index` does) or of when which is better
(`predictors.index_choice` does).

Shape letters: S embedding · N vectors · B queries · M neighbours.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import faiss
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

_IP = faiss.METRIC_INNER_PRODUCT
_LARGEST = 2**62  # above any vector number


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """FAISS called from this thread uses no other one."""
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(num_threads)


class Kind(ABC):
    """Vectors by number, searched by inner product.

    Attributes:
        name: Of the kind.
        settings: Values of `effort` worth trying, ascending: more finds more and takes longer.
        searcher: FAISS's own object: what is written to disk.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[int, ...]]
    searcher: Any

    @property
    @abstractmethod
    def effort(self) -> int:
        """What one search spends; its unit is the kind's own."""

    @effort.setter
    @abstractmethod
    def effort(self, value: int) -> None: ...

    @property
    def num_dead(self) -> int:
        """Replaced vectors that still take memory."""
        return 0

    @abstractmethod
    def __len__(self) -> int:
        """N, without the dead."""

    @abstractmethod
    def put(self, numbers_N: Numbers, vectors_NS: Vectors) -> None:
        """Store vectors under distinct numbers; a number that is taken gets the new vector."""

    @abstractmethod
    def vectors(self, numbers_N: Numbers) -> Vectors:
        """What is stored under these numbers, float32 [N, S]."""

    def search(self, queries_BS: Vectors, num_neighbours: int) -> tuple[Vectors, Numbers]:
        """Products float32 [B, M], largest first, and numbers int64 [B, M], -1 where none."""
        # FAISS shares work by queries: with one of them, a second thread is only waited for. On
        # busy cores that cost 20 ms a query instead of 0.1.
        with one_thread() if len(queries_BS) == 1 else contextlib.nullcontext():
            products_BM, numbers_BM = self._search(queries_BS, num_neighbours)
        return products_BM, numbers_BM

    def _search(self, queries_BS: Vectors, num_neighbours: int) -> tuple[Vectors, Numbers]:
        products_BM, numbers_BM = self.searcher.search(queries_BS, num_neighbours)
        return products_BM, numbers_BM


class Exact(Kind):
    """Every vector is compared: nothing is missed, and time grows with N.

    Numbers are positions, so new ones have to follow the old.

    Args:
        dim: S.
        searcher: An index that was read from a file, or None for an empty one.
    """

    name = "exact"
    settings = (1,)

    def __init__(self, dim: int, searcher: faiss.IndexFlatIP | None = None) -> None:
        self.searcher = faiss.IndexFlatIP(dim) if searcher is None else searcher

    @property
    def effort(self) -> int:
        """Always 1: there is nothing to save."""
        return 1

    @effort.setter
    def effort(self, value: int) -> None: ...

    def __len__(self) -> int:
        """N, without the dead."""
        return int(self.searcher.ntotal)

    def put(self, numbers_N: Numbers, vectors_NS: Vectors) -> None:
        """Overwrite, then append."""
        old = numbers_N < len(self)
        if old.any():
            self._stored()[numbers_N[old]] = vectors_NS[old]
        assert (numbers_N[~old] == len(self) + np.arange((~old).sum())).all()
        self.searcher.add(vectors_NS[~old])

    def vectors(self, numbers_N: Numbers) -> Vectors:
        """A copy."""
        return self._stored()[numbers_N]

    def _stored(self) -> Vectors:
        """FAISS's own memory, float32 [N, S]; good until the next `add`."""
        flat = faiss.rev_swig_ptr(self.searcher.get_xb(), len(self) * self.searcher.d)
        stored_NS: Vectors = flat.reshape(len(self), self.searcher.d)
        return stored_NS


class Ivf(Kind):
    """Cells around k-means centres; only the cells nearest to the query are compared.

    Vectors are kept as float16 (a product is off by about 1e-5 then), which halves the bytes that a
    search reads, and those are what it waits for. `effort` is the number of cells.

    Args:
        dim: S.
        searcher: A trained index.
    """

    name = "ivf"
    settings = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

    def __init__(self, dim: int, searcher: faiss.IndexIVFScalarQuantizer) -> None:
        self.searcher = searcher
        # From number to place, or nothing could be replaced. Not trusted from a file: made anew.
        map_types: Any = faiss.DirectMap  # type: ignore[attr-defined,unused-ignore]
        self.searcher.set_direct_map_type(map_types.NoMap)
        self.searcher.set_direct_map_type(map_types.Hashtable)

    @classmethod
    def trained(cls, sample_NS: Vectors, *, num_cells: int, seed: int) -> "Ivf":
        """An empty index with the cells of a sample; the same sample gives the same cells."""
        dim = sample_NS.shape[1]
        centres = faiss.IndexFlatIP(dim)
        searcher = faiss.IndexIVFScalarQuantizer(
            centres, dim, num_cells, faiss.ScalarQuantizer.QT_fp16, _IP, False
        )
        searcher.cp.seed = seed
        searcher.cp.min_points_per_centroid = 1  # a small sample is the caller's decision
        searcher.train(sample_NS)
        return cls(dim, searcher)

    @property
    def effort(self) -> int:
        """Cells looked into."""
        return int(self.searcher.nprobe)

    @effort.setter
    def effort(self, value: int) -> None:
        self.searcher.nprobe = min(value, self.searcher.nlist)

    def __len__(self) -> int:
        """N, without the dead."""
        return int(self.searcher.ntotal)

    def put(self, numbers_N: Numbers, vectors_NS: Vectors) -> None:
        """Take the old vectors out of their cells, and put the new ones into theirs."""
        self.searcher.remove_ids(faiss.IDSelectorArray(numbers_N))
        self.searcher.add_with_ids(vectors_NS, numbers_N)

    def vectors(self, numbers_N: Numbers) -> Vectors:
        """As float16 remembers them."""
        found: Vectors = self.searcher.reconstruct_batch(numbers_N)
        return found

    def numbers(self) -> Numbers:
        """All numbers, in the order of the cells."""
        cells = self.searcher.invlists
        return np.concatenate(
            [
                faiss.rev_swig_ptr(cells.get_ids(cell), cells.list_size(cell))
                for cell in range(self.searcher.nlist)
                if cells.list_size(cell)
            ]
            or [np.zeros(0, np.int64)]
        )


class Hnsw(Kind):
    """A graph of near vectors, walked greedily towards the query.

    FAISS cannot take a node out of the graph. So a replaced vector stays as a waypoint that no
    search returns (its number becomes -1), and the new one becomes a node of its own: `num_dead`
    counts the former, and whoever owns the index builds it anew when there are many. `effort` is
    the number of candidates that the walk keeps. Vectors are kept as float16, as by `Ivf`: a fifth
    faster than float32, with the same recall.

    Args:
        dim: S.
        searcher: An index that was read from a file (`IndexIDMap` over `IndexHNSWSQ`), or None.
        num_links: Links of a node; twice that in the lowest layer.
    """

    name = "hnsw"
    settings = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

    def __init__(
        self, dim: int, searcher: faiss.IndexIDMap | None = None, *, num_links: int = 32
    ) -> None:
        self._graph: Any
        if searcher is None:
            float16: Any = faiss.ScalarQuantizer.QT_fp16
            self._graph = faiss.IndexHNSWSQ(dim, float16, num_links, _IP)
            searcher = faiss.IndexIDMap(self._graph)
        else:
            self._graph = faiss.downcast_index(searcher.index)
        self.searcher = searcher
        nodes_N = self._number_of_node()
        self._node_of = np.full(int(nodes_N.max(initial=-1)) + 1, -1, np.int64)
        alive_N = nodes_N >= 0
        self._node_of[nodes_N[alive_N]] = np.flatnonzero(alive_N)
        self._num_dead = int((~alive_N).sum())

    @property
    def effort(self) -> int:
        """Candidates kept."""
        return int(self._graph.hnsw.efSearch)

    @effort.setter
    def effort(self, value: int) -> None:
        self._graph.hnsw.efSearch = value

    @property
    def num_dead(self) -> int:
        """Waypoints that no search returns."""
        return self._num_dead

    def __len__(self) -> int:
        """N, without the dead."""
        return int(self.searcher.ntotal) - self._num_dead

    def put(self, numbers_N: Numbers, vectors_NS: Vectors) -> None:
        """Add nodes; those that held the numbers before become waypoints."""
        first = int(self.searcher.ntotal)
        self.searcher.add_with_ids(vectors_NS, numbers_N)
        missing = int(numbers_N.max(initial=-1)) + 1 - len(self._node_of)
        self._node_of = np.pad(self._node_of, (0, max(0, missing)), constant_values=-1)
        old_N = self._node_of[numbers_N]
        old_N = old_N[old_N >= 0]
        self._number_of_node()[old_N] = -1
        self._num_dead += len(old_N)
        self._node_of[numbers_N] = first + np.arange(len(numbers_N))

    def vectors(self, numbers_N: Numbers) -> Vectors:
        """As float16 remembers them."""
        found: Vectors = self._graph.storage.reconstruct_batch(self._node_of[numbers_N])
        return found

    def _search(self, queries_BS: Vectors, num_neighbours: int) -> tuple[Vectors, Numbers]:
        """Walk the graph, through dead nodes too; only living ones are returned."""
        if not self._num_dead:
            return super()._search(queries_BS, num_neighbours)
        # One object per search: FAISS swaps the selector in it while it runs.
        alive = faiss.SearchParametersHNSW(  # type: ignore[attr-defined,unused-ignore]
            sel=faiss.IDSelectorRange(0, _LARGEST), efSearch=self.effort
        )
        products_BM, numbers_BM = self.searcher.search(queries_BS, num_neighbours, params=alive)
        return products_BM, numbers_BM

    def numbers(self) -> Numbers:
        """All numbers of living nodes."""
        numbers_N = self._number_of_node()
        return numbers_N[numbers_N >= 0]

    def links(self) -> npt.NDArray[np.int32]:
        """Every link of the graph as a node, -1 where there is none."""
        links: npt.NDArray[np.int32] = faiss.vector_to_array(self._graph.hnsw.neighbors)
        return links

    def _number_of_node(self) -> Numbers:
        """FAISS's own memory, int64 [N + dead]; good until the next `put`."""
        num_nodes = int(self.searcher.ntotal)
        if not num_nodes:
            return np.zeros(0, np.int64)
        numbers_N: Numbers = faiss.rev_swig_ptr(self.searcher.id_map.data(), num_nodes)
        return numbers_N
