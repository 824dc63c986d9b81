"""What an embedder is: text in, one unit vector out.

Knows nothing of traces or predictors. One file per embedder; `predictors.registry` lists them.

Shape letters: S embedding · N texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt


class Embedder(ABC):
    """Base of all embedders. Subclasses are keyword-only constructed from plain values.

    Attributes:
        kind: The embedder's name: file name, YAML name and what an artifact records.
        dim: S, the length of a vector.
        fingerprint: Digest of everything that shapes a vector (weights, tokenizer, truncation), but
            not of where the model lies: a store made on one machine can be searched on another.
    """

    kind: ClassVar[str]
    dim: int
    fingerprint: str

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [N, S], rows of length 1; a text without any token becomes a row of zeros."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""


def normalized_NS(vectors_NS: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows divided by their L2 norm; rows of zeros stay zeros, and match nothing."""
    norms_N1 = np.linalg.norm(vectors_NS, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors_NS / np.maximum(norms_N1, 1e-12), dtype=np.float32)
