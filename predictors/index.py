"""Nearest vectors by inner product: a thin layer over FAISS.

Exact search (`IndexFlatIP`): at 10^5 vectors of 384 numbers a search takes milliseconds. Knows
nothing of what the vectors mean.

Shape letters: S embedding · N stored vectors · B queries · M neighbours.
"""

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from data.errors import DamagedFileError


class VectorIndex:
    """Vectors numbered 0, 1, ... in the order they were added.

    Args:
        dim: S.
    """

    def __init__(self, *, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: must be at least 1")
        self.dim = dim
        self._faiss = faiss.IndexFlatIP(dim)

    def __len__(self) -> int:
        """N, the number of stored vectors."""
        return int(self._faiss.ntotal)

    def add(self, vectors_NS: npt.NDArray[np.float32]) -> None:
        """Append vectors, float32 [N, S]; normalise them first if cosines are wanted."""
        self._faiss.add(self._checked(vectors_NS))

    def search(
        self, queries_BS: npt.NDArray[np.float32], num_neighbours: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The best matches of each query, best first.

        Returns:
            Inner products float32 [B, M] and vector numbers int64 [B, M]. Where fewer than M
            vectors are stored, the rest has number -1 and product -inf.
        """
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours={num_neighbours}: must be at least 1")
        scores_BM, numbers_BM = self._faiss.search(self._checked(queries_BS), num_neighbours)
        scores_BM[numbers_BM < 0] = -np.inf
        return scores_BM, numbers_BM

    def save(self, path: Path) -> None:
        """Write the index in FAISS's own format."""
        faiss.write_index(self._faiss, str(path))

    @classmethod
    def load(cls, path: Path) -> "VectorIndex":
        """Read what `save` wrote.

        Raises:
            DamagedFileError: The file is missing, truncated, or another kind of index.
        """
        try:
            loaded = faiss.read_index(str(path))
        except RuntimeError as error:
            raise DamagedFileError(path, "FAISS cannot read it") from error
        if not isinstance(loaded, faiss.IndexFlatIP) or loaded.d < 1:
            raise DamagedFileError(path, f"holds a {type(loaded).__name__}, not an IndexFlatIP")
        index = cls(dim=loaded.d)
        index._faiss = loaded
        return index

    def _checked(self, vectors_NS: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if vectors_NS.ndim != 2 or vectors_NS.shape[1] != self.dim:
            raise ValueError(f"vectors of shape {vectors_NS.shape}: must be [N, {self.dim}]")
        return np.ascontiguousarray(vectors_NS, dtype=np.float32)
