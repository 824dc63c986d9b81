"""Nearest vectors by inner product, for stores of a hundred records and of a million.

Up to 10^5 vectors every one of them is compared (5 ms at 384 numbers); beyond that an approximate
index is chosen by what it is measured to do (`predictors.index_choice`, `predictors.index_kinds`).
Any thread may search while another adds or replaces. Knows nothing of what the vectors mean.

Shape letters: S embedding · N stored vectors · B queries · M neighbours.
"""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from data.errors import DamagedFileError
from predictors.index_choice import Measured, build, choose
from predictors.index_kinds import Exact, Hnsw, Ivf, Kind, one_thread
from predictors.rwlock import ReadWriteLock

logger = logging.getLogger(__name__)

EXACT_LIMIT = 100_000
_GROWTH = 4  # an index whose store has grown so many times is built anew, for the new size
_MAX_DEAD = 0.25  # of the living vectors
_CHUNK = 16  # vectors put while searches wait


class VectorIndex:
    """Vectors numbered 0, 1, ... in the order they were added.

    - **search** may run in any number of threads, also during the others.
    - **add** and **replace** are for one thread at a time (others wait). A search sees a vector as
      it was or as it is after that, never half of each: it waits while a few vectors are put in.
      It may see the first vectors of a long `add` before the last.
    - **Building anew** happens inside the `add` that passes ``exact_limit``, that makes the store
      four times as large as it was built for, or the `replace` that leaves a quarter of a graph
      dead. It takes minutes at 10^6 vectors and memory for both indexes; searches go on in the
      old one until they find the new one in its place.

    Approximate search finds the nearest vector in at least ``min_recall`` of searches, as far as
    those resemble the stored vectors; the second and later neighbours are found less often. Where
    even the best index does not reach it, that is logged, and `choice` tells.

    Args:
        dim: S.
        exact_limit: Vectors up to which search is exact, at least 1.
        min_recall: In (0, 1].
        seed: Of everything that is drawn while building.
    """

    def __init__(
        self, *, dim: int, exact_limit: int = EXACT_LIMIT, min_recall: float = 0.95, seed: int = 0
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: must be at least 1")
        if exact_limit < 1:
            raise ValueError(f"exact_limit={exact_limit}: must be at least 1")
        if not 0 < min_recall <= 1:
            raise ValueError(f"min_recall={min_recall}: must be in (0, 1]")
        self.dim = dim
        self.exact_limit = exact_limit
        self.min_recall = min_recall
        self.seed = seed
        self._kind: Kind = Exact(dim)
        self._choice: Measured | None = None
        self._num_built = 0
        self._guard = ReadWriteLock()  # of `_kind` and what is in it
        self._one_writer = threading.Lock()  # held through all of `add` and `replace`

    def __len__(self) -> int:
        """N, the number of stored vectors."""
        with self._guard.reading():
            return len(self._kind)

    @property
    def kind(self) -> str:
        """How it searches: "exact", "ivf" or "hnsw"."""
        return self._kind.name

    @property
    def choice(self) -> Measured | None:
        """What the index in use was measured to do when it was built; None for exact or loaded."""
        return self._choice

    def add(self, vectors_NS: npt.NDArray[np.float32]) -> None:
        """Append vectors, float32 [N, S]; normalise them first if cosines are wanted.

        Raises:
            ValueError: Another shape, or a value that is not finite; nothing is added then.
        """
        vectors_NS = self._checked(vectors_NS)
        with self._one_writer:
            first = len(self._kind)
            self._put(first + np.arange(len(vectors_NS)), vectors_NS)
            self._build_if_due()

    def replace(
        self, numbers_N: npt.NDArray[np.int64], vectors_NS: npt.NDArray[np.float32]
    ) -> None:
        """Give stored vectors, int64 [N] distinct numbers, new values, float32 [N, S].

        Raises:
            ValueError: A number is not stored or comes twice, or the vectors are not as for `add`;
                nothing is replaced then.
        """
        vectors_NS = self._checked(vectors_NS)
        numbers_N = np.asarray(numbers_N, np.int64)
        if numbers_N.shape != vectors_NS.shape[:1]:
            raise ValueError(f"{numbers_N.shape} numbers for vectors of shape {vectors_NS.shape}")
        if len(np.unique(numbers_N)) != len(numbers_N):
            raise ValueError("numbers to replace must be distinct")
        with self._one_writer:
            if len(numbers_N) and not 0 <= numbers_N.min() <= numbers_N.max() < len(self._kind):
                raise ValueError(
                    f"numbers {numbers_N.min()}..{numbers_N.max()} to replace: must be in "
                    f"0..{len(self._kind) - 1}"
                )
            self._put(numbers_N, vectors_NS)
            self._build_if_due()

    def search(
        self, queries_BS: npt.NDArray[np.float32], num_neighbours: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The best matches of each query, best first.

        Returns:
            Inner products float32 [B, M] and vector numbers int64 [B, M]. Where fewer than M
            vectors are stored (or found, if search is not exact), the rest has number -1 and
            product -inf.
        """
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours={num_neighbours}: must be at least 1")
        queries_BS = self._checked(queries_BS)
        with self._guard.reading():
            scores_BM, numbers_BM = self._kind.search(queries_BS, num_neighbours)
        scores_BM[numbers_BM < 0] = -np.inf
        return scores_BM, numbers_BM

    def save(self, path: Path) -> None:
        """Write the index in FAISS's own format, with what was chosen when it was built."""
        with self._guard.reading():
            faiss.write_index(self._kind.searcher, str(path))

    @classmethod
    def load(cls, path: Path) -> "VectorIndex":
        """Read what `save` wrote, of any kind.

        Raises:
            DamagedFileError: The file is missing, truncated, another kind of index, or one whose
                parts contradict each other.
        """
        try:
            loaded = faiss.read_index(str(path))
        except RuntimeError as error:
            raise DamagedFileError(path, "FAISS cannot read it") from error
        index = cls(dim=max(1, loaded.d))
        index._kind = _kind_of(loaded, path)
        index._num_built = len(index._kind)
        return index

    def _put(self, numbers_N: npt.NDArray[np.int64], vectors_NS: npt.NDArray[np.float32]) -> None:
        for start in range(0, len(numbers_N), _CHUNK):
            rows = slice(start, start + _CHUNK)
            # For so few vectors, more threads would mostly wait for each other.
            with self._guard.writing(), one_thread():
                self._kind.put(numbers_N[rows], np.ascontiguousarray(vectors_NS[rows]))

    def _build_if_due(self) -> None:
        """Choose and build another index where this one is outgrown. The writer calls it."""
        old, num_vectors = self._kind, len(self._kind)
        if num_vectors <= self.exact_limit:
            return
        outgrown = isinstance(old, Exact) or num_vectors >= _GROWTH * self._num_built
        if not outgrown and old.num_dead <= _MAX_DEAD * num_vectors:
            return
        logger.info("choosing how to search %d vectors", num_vectors)
        best, _ = choose(old, min_recall=self.min_recall, seed=self.seed)
        new, choice = build(
            old,
            best.candidate,
            min_recall=self.min_recall,
            seed=self.seed,
            clock=time.perf_counter,
        )
        with self._guard.writing():
            self._kind, self._choice, self._num_built = new, choice, num_vectors

    def _checked(self, vectors_NS: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if vectors_NS.ndim != 2 or vectors_NS.shape[1] != self.dim:
            raise ValueError(f"vectors of shape {vectors_NS.shape}: must be [N, {self.dim}]")
        vectors_NS = np.ascontiguousarray(vectors_NS, dtype=np.float32)
        # Least and greatest tell it without a second array of N x S.
        if vectors_NS.size and not np.isfinite([vectors_NS.min(), vectors_NS.max()]).all():
            raise ValueError("vectors hold NaN or infinity: nothing is near to that")
        return vectors_NS


def _kind_of(loaded: Any, path: Path) -> Kind:
    """Wrap what FAISS read, if it is one of ours and its parts fit together."""
    inner: Any = loaded
    if isinstance(loaded, faiss.IndexIDMap):
        inner = faiss.downcast_index(loaded.index)
    kinds = (faiss.IndexFlatIP, faiss.IndexIVFScalarQuantizer, faiss.IndexHNSWSQ)
    of_ours = isinstance(inner, kinds) and inner.metric_type == faiss.METRIC_INNER_PRODUCT
    if not of_ours or loaded.d < 1 or (inner is loaded) == isinstance(inner, faiss.IndexHNSWSQ):
        raise DamagedFileError(
            path, f"holds a {type(inner).__name__}, not an index of this project"
        )
    kind: Kind
    if isinstance(inner, faiss.IndexFlatIP):
        return Exact(loaded.d, loaded)
    if isinstance(inner, faiss.IndexIVFScalarQuantizer):
        ivf = kind = Ivf(loaded.d, loaded)
        numbers_N = ivf.numbers()
    else:
        # FAISS follows numbers and links without looking.
        counts = {loaded.ntotal, loaded.id_map.size(), inner.ntotal, inner.storage.ntotal}
        if len(counts) > 1 or faiss.vector_to_array(loaded.id_map).max(initial=-1) >= loaded.ntotal:
            raise DamagedFileError(path, "its graph and its vectors do not belong together")
        hnsw = kind = Hnsw(loaded.d, loaded)
        numbers_N = hnsw.numbers()
        links = hnsw.links()
        if links.min(initial=-1) < -1 or links.max(initial=-1) >= loaded.ntotal:
            raise DamagedFileError(path, "its graph has a link to a node that is not there")
    if not np.array_equal(np.sort(numbers_N), np.arange(len(kind))):
        raise DamagedFileError(path, "its vectors are not numbered 0, 1, ...")
    return kind
