"""Each loss wants the K used experts on top, and nothing else."""

import math

import pytest
import torch

from predictors.gate_losses import LOSSES, margin, rank

USED = torch.tensor([[True, False, True, False, False]])
SHARES = torch.tensor([[0.5, 0.05, 0.35, 0.05, 0.05]])


@pytest.mark.parametrize("name", LOSSES)
def test_descending_it_puts_the_used_experts_on_top(name: str) -> None:
    scores = torch.tensor([[0.0, 2.0, -1.0, 1.0, 0.5]], requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        loss = LOSSES[name](scores, USED, SHARES)
        assert loss.shape == (1,)
        loss.sum().backward()
        optimizer.step()
    assert set(scores.topk(2).indices[0].tolist()) == {0, 2}


def test_rank_compares_each_used_expert_with_the_unused_ones_alone() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0, 0.0, 0.0]])
    unused = math.log(3.0)  # at half the temperature: 2 x (1, 0, 3, 0, 0)
    expected = 0.5 * sum(math.log1p(math.exp(unused - used)) for used in (2.0, 6.0)) / 2
    assert rank(scores, USED, SHARES).item() == pytest.approx(expected)


def test_margin_is_spent_once_every_used_expert_is_one_above() -> None:
    assert margin(torch.tensor([[2.0, 1.0, 9.0, 0.0, 0.0]]), USED, SHARES).item() == 0
    assert margin(torch.tensor([[1.5, 1.0, 9.0, 0.0, 0.0]]), USED, SHARES).item() == 0.25
