"""The comparison of MoEpic's divisions of memory, on a few tokens of a real trace."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.moepic_split import MACHINES, Tokens, count, divisions, main, replay
from runtime.split_budget import SplitPlan


def tokens_of(experts: list[int], num_experts: int = 4) -> Tokens:
    """One layer, top-1, predicted right every time."""
    used_TLE = np.zeros((len(experts), 1, num_experts), bool)
    used_TLE[np.arange(len(experts)), 0, experts] = True
    return Tokens(used_TLE, used_TLE.astype(float))


def test_what_is_always_resident_is_never_waited_for() -> None:
    tokens = tokens_of([1] * 20)
    times = MACHINES["MoEpic's"]
    plan = SplitPlan(np.array([1.0]), np.array([1]), np.array([0.0]))
    first_only_s = replay(tokens, plan, times, top_k=1)
    never_s = replay(tokens_of([0, 1, 2, 3] * 5), plan, times, top_k=1)
    assert first_only_s <= never_s / 20 + 1e-12


def test_every_division_stays_within_memory() -> None:
    rng = np.random.default_rng(0)
    tokens = tokens_of(rng.integers(0, 4, 50).tolist())
    layers = count(tokens, top_k=1)
    for name, divide in divisions(2.0, layers, MACHINES["H200, PCIe 5"]).items():
        assert divide().memory_L.sum() <= 2.0 + 1e-9, name


def test_the_command_ends_in_one_json_line(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["traces=[esft_law]", "seeds=[0]", "max_tokens=12", "residencies=[0.2]"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["division"] for row in line["rows"]} >= {"Algorithm 1", "optimal", "halves"}
    assert all(row["stall_ms"]["mean"] > 0 for row in line["rows"])
