"""The fit's benchmark times what it says: all tokens, and a calibration on requests shown twice."""

from typing import Any

import pytest

from benchmarks.fit_speed import PARTS, everything_to_fit, time_fits
from data.schema import TraceList
from predictors.forecaster import Forecaster
from tests.predictors.fakes import SPEC, make_trace

SMALL: dict[str, Any] = {
    "hidden_dim": 16,
    "epochs": 1,
    "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
}


@pytest.fixture(scope="module")
def traces() -> TraceList:
    each = [make_trace(f"r{n}", [0, 1, 2, 3] * 10, topic=f"topic {n % 10}") for n in range(20)]
    return TraceList(spec=SPEC, traces=each, split={}, digest="fake")


def test_every_request_is_fitted_and_some_are_shown_again(traces: TraceList) -> None:
    everything = everything_to_fit(traces)
    splits = list(everything.split.values())
    assert splits.count("fit") == 20
    assert 0 < splits.count("val") < 20
    assert "test" not in splits
    assert len(everything.traces) == len(splits)


def test_time_is_told_by_part_and_for_all_tokens(traces: TraceList) -> None:
    _, timed = time_fits(traces, lambda: Forecaster(**SMALL), repeats=2)
    assert timed["num_all_tokens"] == 800
    assert len(timed["fits"]) == 2
    for fit in timed["fits"]:
        assert sum(fit[f"{part}_s"] for part in PARTS) == pytest.approx(fit["fit_s"], rel=0.1)
    assert timed["fit_all_s"] == timed["fits"][-1]["fit_s"]


def test_fits_that_differ_are_not_reported(traces: TraceList) -> None:
    seeds = iter([0, 1])
    with pytest.raises(RuntimeError, match="differ"):
        time_fits(traces, lambda: Forecaster(**SMALL, seed=next(seeds)), repeats=2)
