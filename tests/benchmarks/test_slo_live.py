"""Recorded requests are served by the clock, each to its end, by both schedulers."""

from pathlib import Path

import pytest

from benchmarks.slo_live import Options, Unbounded, run
from runtime.scheduler import StepCosts


def test_both_schedulers_answer_the_same_requests(shared_data: Path) -> None:
    values = run(Options(requests=12, loads=(2.0,), repeats=2, max_batch=4))
    assert [(row["load"], row["scheduler"]) for row in values["rows"]] == [
        (2.0, "fifo"),
        (2.0, "slo"),
    ]
    assert values["costs"]["fixed_s"] + values["costs"]["sequence_s"] > 0
    for row in values["rows"]:
        assert row["kept"]["repeats"] == row["simulated"]["repeats"] == 2
        assert 0 <= row["kept"]["min"] <= row["kept"]["max"] <= 1
        assert 0 < row["ttft_p50_s"]["median"] <= row["ttft_p99_s"]["median"]
    fifo, slo = values["rows"]
    assert "end_error_s" not in fifo
    assert fifo["num_overtaken"] == 0
    assert slo["end_error_s"]["median"] > 0


def test_the_simulation_beside_it_is_of_the_same_server() -> None:
    costs = StepCosts(fixed_s=0.5, sequence_s=0.25, prompt_token_s=0.125, step_tokens=64)
    simulated = Options(requests=7, max_batch=3, max_overtaken=5).simulated(costs)
    assert simulated.costs == costs
    assert (simulated.requests, simulated.max_batch, simulated.max_overtaken) == (7, 3, 5)


def test_an_answers_length_is_hidden_from_the_scheduler() -> None:
    lengths = Unbounded()
    lengths.add("a", 30)
    assert lengths.expected("a", 2) == 30


def test_objectives_are_given_for_each_task(shared_data: Path) -> None:
    with pytest.raises(ValueError, match="ttft_slack"):
        run(Options(ttft_slack=(1.0,), requests=12))
