"""What every predictor inside a graph offers: prompts at once, and rows by themselves."""

from typing import Any

import pytest
import torch

from predictors.forecaster import Forecaster
from predictors.graph import GraphPredictor
from tests.predictors.fakes import SPEC, random_traces
from tests.predictors.graph_fakes import HabitGraph

LENGTHS = (5, 1, 9)
SMALL: dict[str, Any] = {
    "hidden_dim": 16,
    "epochs": 1,
    "batch_size": 32,
    "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
}


def habit(batch_size: int) -> GraphPredictor:
    return HabitGraph(batch_size, SPEC)


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    predictor = Forecaster(**SMALL)
    predictor.fit(random_traces(num_requests=8))
    return predictor


@pytest.mark.parametrize("kind", ["habit", "forecaster"])
def test_prompts_of_different_lengths_are_told_row_by_row(
    kind: str, forecaster: Forecaster
) -> None:
    """What follows is what three modules of one row each say on average."""

    def made(batch_size: int) -> GraphPredictor:
        if kind == "habit":
            return habit(batch_size)
        return forecaster.graph_module(batch_size=batch_size, kernels=False)

    torch.manual_seed(0)
    together, alone = made(len(LENGTHS)), [made(1) for _ in LENGTHS]
    together.begin()
    begun_LE = together.forecast_LE.clone()
    for row, (single, length) in enumerate(zip(alone, LENGTHS, strict=True)):
        single.begin()
        maps_1TLE = torch.rand(1, length, SPEC.num_layers, SPEC.num_experts).softmax(-1)
        ids_1T = torch.randint(4, (1, length))
        for module in (single, together.of_row(row)):
            module.on_prompt(maps_1TLE, ids_1T, torch.tensor([row]))
    assert torch.equal(together.forecast_LE, begun_LE), "a row alone says nothing for the batch"
    for step in range(3):
        maps_BLE = torch.rand(len(LENGTHS), SPEC.num_layers, SPEC.num_experts).softmax(-1)
        ids_B = torch.arange(len(LENGTHS))
        together.on_token(maps_BLE, ids_B, ids_B + step)
        for row, single in enumerate(alone):
            single.on_token(maps_BLE[row, None], ids_B[row, None], ids_B[row, None] + step)
        for name in ("next_LE", "forecast_LE"):
            mean_LE = torch.stack([getattr(single, name) for single in alone]).mean(0)
            torch.testing.assert_close(getattr(together, name), mean_LE, rtol=1e-4, atol=1e-5)


def test_a_prompt_at_once_is_its_tokens_one_by_one() -> None:
    torch.manual_seed(0)
    at_once, one_by_one = habit(2), habit(2)
    maps_BTLE = torch.rand(2, 6, SPEC.num_layers, SPEC.num_experts)
    ids_BT = torch.randint(9, (2, 7))
    at_once.on_prompt(maps_BTLE, ids_BT[:, :6], ids_BT[:, 6])
    for t in range(6):
        one_by_one.on_token(maps_BTLE[:, t], ids_BT[:, t], ids_BT[:, t + 1])
    assert torch.equal(at_once.forecast_LE, one_by_one.forecast_LE)
    assert at_once.forecast_LE.any()
