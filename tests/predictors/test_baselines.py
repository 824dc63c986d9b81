import pytest
import torch

from predictors.base import Request
from predictors.none import Silent
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from tests.predictors.fakes import SPEC, make_trace, make_traces, random_traces


def test_popularity_is_the_mean_use_of_decode_rows_of_fitting_requests() -> None:
    traces = make_traces(
        {
            # Two prefill rows, which use expert 3, then four decode rows.
            "fit": [make_trace("a", [3, 3, 0, 0, 0, 1], num_prefill=2)],
            "val": [make_trace("b", [2] * 9)],
            "test": [make_trace("c", [2] * 9)],
        }
    )
    predictor = Popularity(gamma=0.5)
    report = predictor.fit(traces)
    forecast = predictor.on_request(predictor.new_state(), Request())
    assert forecast is not None
    assert forecast.next_LE.tolist() == [[0.75, 0.25, 0.0, 0.0]] * 2
    assert forecast.forecast_LE.tolist() == [[1.5, 0.5, 0.0, 0.0]] * 2
    assert (report.num_requests, report.num_tokens) == (1, 4)


def test_popularity_of_prefill_only_traces_counts_every_row() -> None:
    predictor = Popularity()
    predictor.fit(make_traces({"fit": [make_trace("a", [3, 3, 0, 0], num_prefill=4)]}))
    assert predictor.tensors()["popularity_LE"][0].tolist() == [0.5, 0.0, 0.0, 0.5]


def test_nothing_to_fit_on_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="split 'fit'.*1 requests.*fake"):
        Popularity().fit(make_traces({"test": [make_trace("a", [0])]}))


@pytest.mark.parametrize("gamma", [-0.1, 1.0])
def test_gamma_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        Popularity(gamma=gamma)


def test_previous_token_ranks_the_last_experts_first_and_popularity_breaks_ties() -> None:
    predictor = PreviousToken()
    predictor.fit(make_traces({"fit": [make_trace("a", [0, 0, 0, 2, 2, 1])]}))
    state = predictor.new_state()
    before = predictor.on_request(state, Request())
    after = predictor.on_token(state, torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2))
    assert before is not None
    assert after is not None
    assert before.next_LE[0].argsort(descending=True).tolist()[:3] == [0, 2, 1]
    assert after.next_LE[0].argsort(descending=True).tolist() == [1, 0, 2, 3]


def test_previous_token_says_the_share_of_experts_that_really_come_again() -> None:
    """Three of four tokens repeat the one before: a used expert returns with probability 3/4."""
    stays = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3] * 16
    predictor = PreviousToken()
    report = predictor.fit(
        make_traces({"fit": [make_trace("a", stays)], "val": [make_trace("b", stays)]})
    )
    forecast = predictor.on_token(predictor.new_state(), torch.eye(4)[:2])
    assert forecast is not None
    assert forecast.next_LE[0].tolist() == pytest.approx([0.75, 1 / 12, 1 / 12, 1 / 12], abs=0.02)
    assert report.details["val_calibration_error_before"] > 0.1
    assert report.details["val_calibration_error_after"] < 0.01


def test_oracle_says_the_next_use_and_the_discounted_future() -> None:
    predictor = Oracle(gamma=0.5)
    trace = make_trace("a", [0, 1, 0])
    predictor.fit(make_traces({"test": [trace]}))
    said = predictor.walk(trace, with_truth=True).forecasts
    assert [forecast.next_LE[0].argmax().item() for forecast in said if forecast] == [0, 1, 0]
    assert said[0] is not None
    assert said[0].forecast_LE[0].tolist() == [1.25, 0.5, 0.0, 0.0]


def test_oracle_says_nothing_past_the_end() -> None:
    predictor = Oracle()
    trace = make_trace("a", [2])
    predictor.fit(make_traces({"test": [trace]}))
    state = predictor.new_state()
    predictor.on_request(state, Request.of(trace, with_truth=True))
    assert predictor.on_token(state, torch.eye(4)[:2]) is None


def test_oracle_refuses_a_request_without_its_truth() -> None:
    predictor = Oracle()
    predictor.fit(random_traces())
    with pytest.raises(ValueError, match="oracle.*truth"):
        predictor.on_request(predictor.new_state(), Request(prompt="cats"))


def test_none_never_says_anything() -> None:
    predictor = Silent()
    traces = random_traces()
    predictor.fit(traces)
    assert set(predictor.walk(traces[0]).forecasts) == {None}
    assert predictor.spec == SPEC


def test_unfitted_predictor_says_that_it_is_not_fitted() -> None:
    with pytest.raises(ValueError, match="popularity.*not fitted"):
        Popularity().on_request(Popularity().new_state(), Request())
