import pytest
import torch

from predictors.request_history import RequestHistory, last_call
from tests.predictors.fakes import make_trace


def filled(num: int, capacity: int = 256) -> RequestHistory:
    history = RequestHistory(capacity=capacity)
    for n in range(num):
        history.add(torch.full((2, 4), n / 100))
    return history


def numbers(history: RequestHistory, request: int, num: int) -> list[int]:
    return [round(100 * float(use_LE[0, 0])) for use_LE in history.before(request, num)]


def test_the_requests_before_one_come_oldest_first() -> None:
    history = filled(5)
    assert numbers(history, 5, 3) == [2, 3, 4]
    assert numbers(history, 3, 2) == [1, 2]
    assert numbers(history, 1, 3) == [0]
    assert numbers(history, 0, 3) == []


def test_what_capacity_dropped_is_missing_and_still_counted() -> None:
    history = filled(10, capacity=4)
    assert history.num_finished == 10
    assert numbers(history, 8, 4) == [6, 7]
    assert numbers(history, 3, 2) == []


def test_a_trace_leaves_the_share_of_its_decode_rows() -> None:
    history = RequestHistory()
    history.add_trace(make_trace("a", [3, 3, 0, 1], num_prefill=2), 4)
    history.add_trace(make_trace("nothing routed", []), 4)
    assert history.num_finished == 1
    assert history.before(1, 1)[0].tolist() == [[0.5, 0.5, 0.0, 0.0]] * 2


@pytest.mark.parametrize("period", [1, 2, 3, 40])
def test_a_call_is_made_after_the_first_request_and_every_period_from_there(period: int) -> None:
    made = [last_call(n, period) for n in range(3 * period + 2)]
    assert made[0] == 0
    assert sorted(set(made[1:])) == [1, 1 + period, 1 + 2 * period, 1 + 3 * period]
    assert all(0 <= n - at < period for n, at in enumerate(made))


@pytest.mark.parametrize(
    ("use_LE", "message"),
    [
        (torch.zeros(2, 5), r"\(2, 5\): must be \(2, 4\)"),
        (torch.full((2, 4), 1.5), "share"),
        (torch.full((2, 4), float("nan")), "share"),
    ],
)
def test_what_is_no_share_of_the_same_experts_is_refused(
    use_LE: torch.Tensor, message: str
) -> None:
    history = filled(1)
    with pytest.raises(ValueError, match=message):
        history.add(use_LE)
    assert history.num_finished == 1


def test_capacity_is_at_least_1() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        RequestHistory(capacity=0)
