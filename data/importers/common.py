"""What the importers share: looking into files, checking ids, known architectures.

Knows no format.
"""

import gzip
import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from data.errors import DamagedFileError
from data.schema import MoESpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peek:
    """What can be told of a file without reading it whole.

    Args:
        kind: "npz", "npy", "text" (also gzipped) or "other".
        arrays: The names of an npz file's arrays.
        first_line: The first line of a text file.
    """

    kind: Literal["npz", "npy", "text", "other"]
    arrays: frozenset[str] = frozenset()
    first_line: str = ""


def peek(path: Path) -> Peek:
    """Look at the beginning of a file; DamagedFileError if even that cannot be read."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = frozenset(name.removesuffix(".npy") for name in archive.namelist())
        except zipfile.BadZipFile as error:
            raise DamagedFileError(path, str(error)) from error
        return Peek(kind="npz", arrays=names)
    if magic == b"\x93NUMPY":
        return Peek(kind="npy")
    with open_text(path) as lines:
        try:
            return Peek(kind="text", first_line=lines.readline())
        except UnicodeDecodeError:
            return Peek(kind="other")


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open UTF-8 text, gzipped or not (told by its content); a cut-off file is named as damaged."""
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with (
        gzip.open(path, "rt", encoding="utf-8") if gzipped else path.open(encoding="utf-8") as file
    ):
        try:
            yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedFileError(path, str(error)) from error


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an npz file; DamagedFileError if one cannot be read. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        raise DamagedFileError(path, str(error)) from error


def compact_ids(
    ids_TLK: npt.NDArray[Any], num_experts: int, path: Path
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int16]:
    """Check expert ids and bring them to the smallest dtype of a trace (uint8 or int16).

    Raises:
        DamagedFileError: An id is out of range, or an expert stands twice in a token's layer.
    """
    if ids_TLK.ndim != 3 or not np.issubdtype(ids_TLK.dtype, np.integer):
        raise DamagedFileError(
            path, f"expert ids must be integers [T, L, K], not {ids_TLK.dtype} {ids_TLK.shape}"
        )
    if ids_TLK.size and not 0 <= int(ids_TLK.min()) <= int(ids_TLK.max()) < num_experts:
        raise DamagedFileError(
            path,
            f"expert ids from {ids_TLK.min()} to {ids_TLK.max()}, "
            f"but the model has experts 0..{num_experts - 1}",
        )
    sorted_TLK = np.sort(ids_TLK, axis=-1)
    repeated_TL = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any(axis=-1)
    if repeated_TL.any():
        t, layer = np.argwhere(repeated_TL)[0]
        raise DamagedFileError(
            path, f"routed token {t}, layer {layer} names an expert twice: {ids_TLK[t, layer]}"
        )
    if num_experts <= 256:
        return ids_TLK.astype(np.uint8, copy=False)
    return ids_TLK.astype(np.int16, copy=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Architecture:
    """What published traces leave out of a model: sizes from its public config."""

    hidden_size: int
    expert_intermediate_size: int
    has_bias: bool = False
    num_dense_layers: int = 0  # before the first MoE layer

    def expert_bytes(self, bytes_per_weight: int = 2) -> int:
        """Gate, up and down of one expert, in bf16 unless told otherwise."""
        num_weights = 3 * self.hidden_size * self.expert_intermediate_size
        if self.has_bias:
            num_weights += 2 * self.expert_intermediate_size + self.hidden_size
        return num_weights * bytes_per_weight


# Matched as a part of the model's name, in any case.
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "gpt-oss-20b": _Architecture(hidden_size=2880, expert_intermediate_size=2880, has_bias=True),
    "esft-vanilla-lite": _Architecture(
        hidden_size=2048, expert_intermediate_size=1408, num_dense_layers=1
    ),
    "deepseek-moe-16b": _Architecture(
        hidden_size=2048, expert_intermediate_size=1408, num_dense_layers=1
    ),
    "jetmoe-8b": _Architecture(hidden_size=2048, expert_intermediate_size=5632),
}


def spec_of(
    model_id: str,
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    decoder_layers: tuple[int, ...] | None = None,
) -> MoESpec:
    """The spec of a recorded model; sizes in bf16 where we know its architecture.

    Args:
        model_id: As the trace names it.
        num_layers: L.
        num_experts: E.
        top_k: K.
        decoder_layers: If the trace says; else the last L after the known dense layers.
    """
    known = next((a for name, a in _ARCHITECTURES.items() if name in model_id.lower()), None)
    if decoder_layers is None:
        first = known.num_dense_layers if known else 0
        decoder_layers = tuple(range(first, first + num_layers))
    if known is None:
        logger.info("%s: its trace says nothing of its experts' size", model_id)
    return MoESpec(
        model_id=model_id,
        num_experts=num_experts,
        top_k=top_k,
        decoder_layers=decoder_layers,
        expert_bytes_per_layer=(known.expert_bytes(),) * num_layers if known else None,
        hidden_size=known.hidden_size if known else None,
        expert_intermediate_size=known.expert_intermediate_size if known else None,
    )
