"""Reliability: what forecasts said against what came true.

Entries of `Forecast.next_LE` are grouped by what they say; each group's mean is held against how
often it came true. Knows nothing of where forecasts come from.

Shape letters: L MoE layers · E experts per layer · R forecasts in a row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Reliability:
    """What was said against what came true, in equal bins of [0, 1].

    Attributes:
        num_entries: int64 per bin: (token, layer, expert) entries of `next_LE`.
        said: Mean of the entries of each bin; NaN where there is none.
        came_true: Share of them that was used; NaN where there is none.
    """

    num_entries: npt.NDArray[np.int64]
    said: npt.NDArray[np.float64]
    came_true: npt.NDArray[np.float64]

    @property
    def expected_calibration_error(self) -> float:
        """Mean |said - came true| over all entries, bin by bin; NaN without entries."""
        used = self.num_entries > 0
        gap = np.abs(self.said[used] - self.came_true[used])
        total = int(self.num_entries.sum())
        return float(gap @ self.num_entries[used] / total) if total else float("nan")


class ReliabilityCount:
    """Adds up `Reliability`, one batch of forecasts at a time.

    Args:
        num_bins: Equal bins of [0, 1].
    """

    def __init__(self, *, num_bins: int) -> None:
        self._num_entries = np.zeros(num_bins)
        self._said = np.zeros(num_bins)
        self._used = np.zeros(num_bins)

    def add(
        self,
        next_RLE: npt.NDArray[np.float32],
        used_RLE: npt.NDArray[np.int32],
        tokens_R: npt.NDArray[np.int64],
    ) -> None:
        """Count forecasts that were in force for ``tokens_R`` tokens, used ``used_RLE`` times."""
        num_bins = len(self._used)
        bins = np.clip((next_RLE * num_bins).astype(np.int32), 0, num_bins - 1).ravel()
        entries = np.broadcast_to(tokens_R[:, None, None], next_RLE.shape).ravel()
        self._num_entries += np.bincount(bins, entries, num_bins)
        self._said += np.bincount(bins, entries * next_RLE.ravel(), num_bins)
        self._used += np.bincount(bins, used_RLE.ravel(), num_bins)

    def result(self) -> Reliability:
        """The bins so far."""
        with np.errstate(invalid="ignore"):
            said, came_true = self._said / self._num_entries, self._used / self._num_entries
        return Reliability(self._num_entries.astype(np.int64), said, came_true)
