import logging

import numpy as np
import pytest
import torch

from data.schema import TraceList
from predictors.base import Forecast
from predictors.calibrate import Calibration, fit_calibration
from predictors.metrics import evaluate_recall
from tests.predictors.fakes import ScriptedPredictor, make_trace, make_traces


class Boaster(ScriptedPredictor):
    """Says 0.9 / 0.4 / 0.2 / 0.1 of experts that are used 60 / 20 / 20 / 0 % of the time."""

    def __init__(self) -> None:
        said_LE = torch.tensor([[0.9, 0.4, 0.2, 0.1]] * 2)
        super().__init__([Forecast(said_LE, said_LE)])


def val_traces() -> TraceList:
    experts = [0] * 60 + [1] * 20 + [2] * 20
    return make_traces({"val": [make_trace("a", experts)]})


def test_what_is_said_comes_true_after_calibration() -> None:
    calibration, report = fit_calibration(Boaster(), val_traces())
    mapped = calibration(torch.tensor([0.9, 0.4, 0.2, 0.1]))
    assert mapped.tolist() == pytest.approx([0.6, 0.2, 0.2, 0.0], abs=0.01)
    assert report["val_calibration_error_before"] == pytest.approx((0.3 + 0.2 + 0 + 0.1) / 4)
    assert report["val_calibration_error_after"] < 0.01
    assert report["val_num_tokens"] == 100


def test_rankings_survive_even_where_experts_came_true_equally_often() -> None:
    calibration, _ = fit_calibration(Boaster(), val_traces())
    said = torch.from_numpy(np.sort(np.random.default_rng(0).random(500).astype(np.float32)))
    assert (calibration(said).diff() > 0).all()


def test_forecasts_that_are_nearly_certain_can_be_calibrated() -> None:
    """Knots at 0 + 1e-9 and 1 - 1e-7 differ to a float64 alone: 'must be strictly increasing'."""
    predictor = Boaster()
    said_LE = torch.tensor([[1 - 1e-7, 0.4, 0.2, 1e-9]] * 2)
    predictor.script = [Forecast(said_LE, said_LE)]
    calibration, _ = fit_calibration(predictor, val_traces())
    mapped = calibration(torch.tensor([1.0, 0.4, 0.2, 0.0]))
    assert mapped.tolist() == pytest.approx([0.6, 0.2, 0.2, 0.0], abs=0.01)


def test_slot_recall_is_the_same_before_and_after() -> None:
    traces = val_traces()
    raw = Boaster()
    calibration, _ = fit_calibration(raw, traces)
    said = raw.script[0]
    assert said is not None
    mapped = ScriptedPredictor([Forecast(calibration(said.next_LE), said.forecast_LE)])
    before = evaluate_recall(raw, traces, split="val")
    after = evaluate_recall(mapped, traces, split="val")
    assert after.recall_by_fetched == before.recall_by_fetched
    assert (
        after.reliability.expected_calibration_error < before.reliability.expected_calibration_error
    )


def test_without_val_requests_nothing_changes_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        calibration, report = fit_calibration(
            Boaster(), make_traces({"fit": [make_trace("a", [0])]})
        )
    assert "'val'" in caplog.text
    assert report == {"calibrated": False}
    assert calibration(torch.tensor([0.0, 0.3, 1.0])).tolist() == pytest.approx([0.0, 0.3, 1.0])


def test_values_outside_the_unit_interval_are_clamped() -> None:
    assert Calibration.identity()(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 1.0]


def test_tensors_round_trip() -> None:
    calibration, _ = fit_calibration(Boaster(), val_traces())
    again = Calibration.from_tensors(calibration.tensors())
    said = torch.rand(100)
    assert torch.equal(again(said), calibration(said))


@pytest.mark.parametrize(
    ("said", "true"),
    [
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.1, 0.2, 1.0]),
        ([0.0, 0.5, 1.0], [0.0, 0.0, 1.0]),
        ([0.1, 1.0], [0.0, 1.0]),
        ([0.0, 1.0], [0.0, 1.5]),
        ([0.0], [0.0]),
    ],
)
def test_knots_that_would_change_rankings_or_leave_the_unit_interval_are_refused(
    said: list[float], true: list[float]
) -> None:
    with pytest.raises(ValueError, match="knots"):
        Calibration(torch.tensor(said), torch.tensor(true))
