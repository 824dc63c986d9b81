import pytest
import torch

from predictors.base import Forecast, Walked
from predictors.pooling import Rows, least_squares, pool_log_odds, rows_of

UNKNOWN = Forecast(torch.full((1, 2), 0.5), torch.full((1, 2), 1.0))


def used(*experts: int) -> torch.Tensor:
    """float32 [T, 1, 2]."""
    return torch.eye(2)[list(experts)][:, None]


def test_the_future_near_the_end_is_scaled_up_and_counts_less() -> None:
    """gamma = 1/2: one further use at a time adds up to 1 over an endless request."""
    use_TLE = used(1, 0, 0, 1)
    rows = rows_of([Walked([UNKNOWN] * 4, None)], use_TLE, [0, 2, 3], gamma=0.5)
    assert rows.weight_R.tolist() == [0.5 + 0.25 + 0.125, 0.5, 0.0]
    seen = [(0.5 + 0.25) / 0.875, 0.125 / 0.875]
    assert rows.future_RLE[0, 0].tolist() == pytest.approx(seen)
    assert rows.future_RLE[1, 0].tolist() == [0.0, 1.0]
    assert rows.used_RLE[:, 0].argmax(-1).tolist() == [1, 0, 1]


def test_who_speaks_once_a_layer_has_routed_is_taken_at_that_and_others_at_later_use() -> None:
    routed = Walked([UNKNOWN] * 3, torch.tensor([[[3.0, 4.0]]] * 3))
    rows = rows_of([routed, Walked([UNKNOWN] * 3, None)], used(0, 1, 0), [0, 1], gamma=0.5)
    assert rows.routed_MRLE[0, 0, 0].tolist() == [3.0, 4.0]
    assert rows.routed_MRLE[1, 0, 0].tolist() == [0.5, 0.5]
    assert torch.equal(rows.later_MRLE, torch.full((2, 2, 1, 2), 0.5))


def test_layers_get_weights_of_their_own() -> None:
    """Member 0 is right in layer 0 and says nothing in layer 1; member 1 the other way round."""
    torch.manual_seed(0)
    used_RLE = (torch.rand(500, 2, 4) < 0.3).float()
    right = 0.1 + 0.6 * used_RLE
    blind = torch.full_like(right, 0.3)
    next_MRLE = torch.stack([right, blind])
    next_MRLE[:, :, 1] = torch.stack([blind, right])[:, :, 1]
    weights_ML, _, losses = pool_log_odds(next_MRLE, used_RLE)
    assert (weights_ML.argmax(0) == torch.tensor([0, 1])).all()
    assert losses[2] < min(losses[:2]) - 0.1


def test_where_every_expert_is_always_used_one_member_takes_the_layer() -> None:
    next_MRLE = torch.stack([torch.full((5, 1, 2), 0.9), torch.full((5, 1, 2), 0.6)])
    weights_ML, bias_L, losses = pool_log_odds(next_MRLE, torch.ones(5, 1, 2))
    assert weights_ML[:, 0].tolist() == [1.0, 0.0]
    assert bias_L.tolist() == [0.0]
    assert losses[2] == losses[0] < losses[1]


def test_later_use_is_never_subtracted_and_rows_without_a_future_weigh_nothing() -> None:
    truth_RLE = torch.rand(50, 1, 4)
    later_MRLE = torch.stack([truth_RLE / 2, 1 - truth_RLE])
    weight_R = torch.cat([torch.ones(25), torch.zeros(25)])
    truth_RLE[25:] = 99.0
    rows = Rows(later_MRLE, later_MRLE, later_MRLE, truth_RLE, truth_RLE, weight_R)
    assert least_squares(later_MRLE, rows)[:, 0].tolist() == pytest.approx([2.0, 0.0], abs=1e-3)
    blind = rows._replace(weight_R=torch.zeros(50))
    assert least_squares(later_MRLE, blind)[:, 0].tolist() == [0.5, 0.5]
