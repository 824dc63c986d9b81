"""Making a forecast's 0.3 come true 30 % of the time, without changing what it ranks first.

A strictly increasing, piecewise linear map from what is said to what came true, fitted on the "val"
requests, stored as two small tensors. Knows nothing of how a forecast is made.

Shape letters: N knots · L MoE layers · E experts per layer.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.schema import TraceSet
from predictors.base import Predictor
from predictors.metrics import evaluate_recall
from predictors.routing import traces_of

logger = logging.getLogger(__name__)

_NUM_BINS = 1000
_LEAST_GAP = 1e-4  # between knots: closer ones may mean the same to a float32
_SLOPE = 0.01  # share of the identity mixed in: isotonic steps are flat, and flat makes ties


class Calibration:
    """Piecewise linear map of [0, 1] into itself through N strictly increasing knots.

    Args:
        said_N: float32, ascending from 0 to 1.
        true_N: float32, ascending, what each of them means.

    Raises:
        ValueError: The knots are not strictly increasing, or do not span [0, 1].
    """

    def __init__(self, said_N: Tensor, true_N: Tensor) -> None:
        if said_N.shape != true_N.shape or said_N.ndim != 1 or len(said_N) < 2:
            raise ValueError(f"knots of shapes {said_N.shape} and {true_N.shape}: must be [N] each")
        if not ((said_N.diff() > 0).all() and (true_N.diff() > 0).all()):
            raise ValueError("calibration knots must be strictly increasing, or rankings change")
        if said_N[0] != 0 or said_N[-1] != 1 or true_N[0] < 0 or true_N[-1] > 1:
            raise ValueError("calibration knots must map [0, 1] into itself")
        self.said_N, self.true_N = said_N, true_N

    @classmethod
    def identity(cls) -> "Calibration":
        """Nothing is changed."""
        return cls(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))

    def __call__(self, next_LE: Tensor) -> Tensor:
        """Calibrated probabilities, any shape; values outside [0, 1] are clamped first."""
        return interpolate(next_LE, self.said_N, self.true_N, slopes(self.said_N, self.true_N))

    def tensors(self) -> dict[str, Tensor]:
        """The knots, named for an artifact."""
        return {"calibration_said_N": self.said_N, "calibration_true_N": self.true_N}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Calibration":
        """Inverse of `tensors`."""
        return cls(tensors["calibration_said_N"], tensors["calibration_true_N"])


def slopes(said_N: Tensor, true_N: Tensor) -> Tensor:
    """Of the pieces between these knots: float32 [N - 1]."""
    return true_N.diff() / said_N.diff()


def interpolate(next_LE: Tensor, said_N: Tensor, true_N: Tensor, slope_N: Tensor) -> Tensor:
    """The piecewise linear map through these knots, as a program that a CUDA graph can hold."""
    next_LE = next_LE.clamp(0.0, 1.0)
    # right=True: a value on a knot belongs to the piece that starts there.
    piece_LE = torch.bucketize(next_LE, said_N[1:-1], right=True)
    return true_N[piece_LE] + slope_N[piece_LE] * (next_LE - said_N[piece_LE])


def fit_calibration(predictor: Predictor, traces: TraceSet) -> tuple[Calibration, dict[str, Any]]:
    """Fit the map on what a (still uncalibrated) predictor says about the "val" requests.

    Isotonic regression over 1000 bins, weighted by their entries, with 1 % of the identity mixed in
    so that no two forecasts become equal.

    Returns:
        The map, and the expected calibration error before and after on the same requests, at the
        resolution of those bins. Without "val" requests: the identity, and a warning.
    """
    if next(traces_of(traces, "val"), None) is None:
        logger.warning("no request has split 'val': forecasts of %r stay raw", predictor.kind)
        return Calibration.identity(), {"calibrated": False}
    # Only fitting needs it, so a serving process never loads it.
    from sklearn.isotonic import IsotonicRegression  # type: ignore[import-untyped,unused-ignore]

    report = evaluate_recall(predictor, traces, split="val", lookaheads=(1,), num_bins=_NUM_BINS)
    bins = report.reliability
    used = bins.num_entries > 0
    if not used.any():
        logger.warning("%r made no forecast for the 'val' requests", predictor.kind)
        return Calibration.identity(), {"calibrated": False}
    said, came_true, weight = bins.said[used], bins.came_true[used], bins.num_entries[used]
    isotonic = IsotonicRegression(y_min=0.0, y_max=1.0).fit(said, came_true, weight)
    knots, values = isotonic.X_thresholds_, isotonic.y_thresholds_
    inside = (knots > _LEAST_GAP) & (knots < 1 - _LEAST_GAP)
    knots = np.concatenate([[0.0], knots[inside], [1.0]])
    knots = knots[np.diff(knots, prepend=-1.0) > _LEAST_GAP]
    values = np.interp(knots, isotonic.X_thresholds_, isotonic.y_thresholds_)
    knots_N = torch.from_numpy(knots).float()
    values_N = torch.from_numpy((1 - _SLOPE) * values + _SLOPE * knots).float()
    calibration = Calibration(knots_N, values_N)
    after = calibration(torch.from_numpy(said).float()).numpy()
    return calibration, {
        "calibrated": True,
        "val_num_tokens": report.num_tokens,
        "val_calibration_error_before": bins.expected_calibration_error,
        "val_calibration_error_after": float(np.abs(after - came_true) @ weight / weight.sum()),
    }
