"""The replay of batches counts what it says, and grouping helps where there are groups."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.batch_scheduling import Options, replay, run


def sequence(expert: int, length: int) -> Tensor:
    """Always the same expert of the only layer."""
    use_TLE = torch.zeros(length, 1, 4, dtype=torch.bool)
    use_TLE[:, 0, expert] = True
    return use_TLE


USES = [sequence(i % 2, 5) for i in range(8)]


def expected(index: int) -> Tensor:
    return USES[index][0].float()


@pytest.mark.parametrize(("knows", "distinct"), [(False, 2.0), (True, 1.0)])
def test_sequences_that_are_alike_need_fewer_experts_together(knows: bool, distinct: float) -> None:
    cost = replay(
        USES,
        list(range(8)),
        batch=2,
        waiting=8,
        slots=1,
        forecast_of=expected if knows else None,
        max_overtaken=9,
    )
    assert (cost.steps, cost.tokens) == (20, 40)
    assert cost.distinct / cost.steps == distinct
    # A change of kind costs one; mixed, one of the two is in the slot and the other is not.
    assert cost.misses == (4 if knows else 21)
    assert max(cost.waited) == (1 if knows else 0)


def test_the_benchmark_runs_on_recorded_routing(shared_data: Path) -> None:
    rows = run(
        Options(batches=(2,), predictors=("oracle",), requests=8, tokens=4, seeds=1, waiting=4)
    )
    assert [row["scheduler"] for row in rows] == ["fifo", "oracle"]
    for row in rows:
        assert 4 <= row["distinct_per_layer"]["median"] <= 8  # two tokens of four experts each
