"""The simulated server takes the time that passes cost, and runs on recorded arrivals."""

from pathlib import Path

import pytest

from benchmarks.slo_scheduling import Options, make_jobs, run
from benchmarks.slo_simulation import Job, Moment, simulate
from benchmarks.step_costs import Options as StepOptions
from benchmarks.step_costs import measure
from runtime.scheduler import SloRequest, StepCosts

COSTS = StepCosts(fixed_s=1.0, sequence_s=0.5, prompt_token_s=0.25, step_tokens=4)


def job(name: str, prompt: int, answer: int, arrival_s: float = 0.0) -> Job:
    return Job(
        SloRequest(
            name=name,
            arrival_s=arrival_s,
            prompt_tokens=prompt,
            expected_tokens=answer,
            ttft_s=6.0,
            tpot_s=2.25,
            load_s=0.0,
        ),
        answer,
    )


def take_all(moment: Moment) -> list[SloRequest]:
    return list(moment.waiting)


def test_a_pass_makes_a_token_each_and_reads_prompts_with_what_is_left() -> None:
    """By hand: 6 prompt tokens take passes of 4 and 2, the second sequence's come in between."""
    served = simulate([job("a", 6, 3), job("b", 4, 1)], take_all, costs=COSTS, max_batch=2)
    a, b = served
    # 4 tokens of a; 2 of a and 2 of b; a token of a and 2 of b; a token of a.
    assert a.first_token_s == (1 + 0.5 + 1) + (1 + 2 * 0.5 + 1)
    assert b.first_token_s == b.end_s == 5.5 + (1 + 2 * 0.5 + 0.5)
    assert a.end_s == 8.0 + (1 + 0.5)
    assert a.keeps  # 5.5 and 2.0 seconds
    assert not b.keeps


def test_a_machine_without_work_waits_for_the_next_arrival() -> None:
    served = simulate(
        [job("a", 1, 1), job("b", 1, 1, arrival_s=9.0)], take_all, costs=COSTS, max_batch=1
    )
    assert [one.end_s for one in served] == [1.75, 9.0 + 1.75]


@pytest.mark.parametrize("batch", [0, 1])
def test_a_scheduler_that_takes_nobody_or_too_many_is_told(batch: int) -> None:
    jobs = [job("a", 1, 1), job("b", 1, 1)]
    with pytest.raises(RuntimeError, match=f"{2 * batch} of 1 places"):
        simulate(jobs, lambda m: m.waiting[: 2 * batch], costs=COSTS, max_batch=1)


def test_loads_are_shares_of_what_full_batches_can_do() -> None:
    recorded = [(float(i), 100, 50) for i in range(2200)]
    options = Options(requests=100, max_batch=4)
    whole, half = (make_jobs(recorded, options, load=load, seed=0) for load in (1.0, 0.5))
    full_pass_s = options.costs.step_s(num_sequences=4, num_prompt_tokens=0)
    work_s = 100 * (50 * full_pass_s / 4 + 100 * options.prompt_token_s)
    assert whole[-1].request.arrival_s == pytest.approx(work_s)
    assert half[-1].request.arrival_s == pytest.approx(2 * work_s)
    assert {one.request.task for one in whole} == {"interactive", "background"}
    with pytest.raises(ValueError, match="requests=300"):
        make_jobs(recorded, Options(requests=300), load=1.0, seed=0)


def test_more_objectives_are_kept_than_in_order_of_arrival_on_recorded_load(
    shared_data: Path,
) -> None:
    rows = run(Options(requests=300, loads=(0.1, 1.0), seeds=1))
    kept = {(row["load"], row["scheduler"]): row["kept"]["median"] for row in rows}
    assert len(kept) == 12
    assert kept[1.0, "slo, mean lengths"] > kept[1.0, "fifo"] + 0.05
    assert kept[0.1, "slo, mean lengths"] >= kept[0.1, "fifo"]
    assert all(row["most_overtaken"] == 0 for row in rows if row["scheduler"] == "fifo")


def test_objectives_are_given_for_each_task() -> None:
    with pytest.raises(ValueError, match="ttft_slack"):
        run(Options(ttft_slack=(1.0,)))


def test_steps_of_the_embedded_model_are_timed() -> None:
    timed, (costs, _) = measure(StepOptions(batches=(1, 2), prompts=(16,), repeats=2))
    assert [step[:2] for step in timed] == [(1, 0), (2, 0), (1, 16)]
    assert all(step.step_s > 0 for step in timed)
    assert costs.fixed_s + costs.sequence_s > 0
