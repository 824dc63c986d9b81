"""Admission by objectives: what Eq. 3 says, whom Algorithm 1 takes, and that nobody starves."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.slo_simulation import Job, Moment, Served, simulate
from runtime.scheduler import (
    Progress,
    SloRequest,
    SloScheduler,
    StepCosts,
    expect,
    overtakes,
)

UNIT = StepCosts(fixed_s=0.0, sequence_s=1.0, prompt_token_s=1.0, step_tokens=1000)
MIXED = StepCosts(fixed_s=0.5, sequence_s=0.25, prompt_token_s=0.125, step_tokens=8)


def request(name: str = "r", **values: Any) -> SloRequest:
    plain = {
        "arrival_s": 0.0,
        "prompt_tokens": 1,
        "expected_tokens": 1,
        "ttft_s": math.inf,
        "tpot_s": math.inf,
    }
    return SloRequest(name=name, **{**plain, **values})


def decoding(name: str, *, left: int, made: int = 1, tpot_s: float = math.inf) -> Progress:
    """A running request that got its tokens so far at time 0."""
    own = request(name, expected_tokens=made + left, tpot_s=tpot_s)
    return Progress(own, read_tokens=1, made_tokens=made, first_token_s=0.0)


def admitted(scheduler: SloScheduler, waiting: list[SloRequest], *running: Progress) -> list[str]:
    taken = scheduler.admit(now_s=0.0, running=running, waiting=waiting, overtaken={})
    return [one.name for one in taken]


@pytest.mark.parametrize(
    ("made", "left"), [(0, 100), (60, 40), (99, 1), (100, 5), (101, 4), (104, 1), (105, 5)]
)
def test_an_answer_that_outgrows_its_expectation_gets_a_twentieth_anew(
    made: int, left: int
) -> None:
    assert Progress(request(expected_tokens=100), 1, made).left_tokens == left


def test_a_request_waits_for_its_own_tokens_and_those_of_others_while_it_runs() -> None:
    """By hand: 4 to go beside 2 and 9 to go, and a prompt of 3: 4 + 2 + 4 + 3 + (4 - 0) seconds.

    The prompt's owner makes a token in the same passes, since one pass reads it whole.
    """
    others = [decoding("b", left=2), decoding("c", left=9)]
    reads = Progress(request("d", prompt_tokens=3, expected_tokens=7))
    for tpot_s, keeps in ((17 / 4, True), (16.9 / 4, False)):
        batch = [decoding("a", left=4, tpot_s=tpot_s), *others, reads]
        assert expect(batch, now_s=0.0, costs=UNIT).kept_B[0] == keeps


def test_a_first_token_waits_for_the_prompts_ahead_and_for_all_loading() -> None:
    """Prompts of 12 and 6 take two and three passes of 8 tokens; loading delays everybody."""
    ahead = Progress(request("a", prompt_tokens=12, expected_tokens=1, load_s=2.0))
    first_s = 2.0 + 3 * MIXED.fixed_s + 2 * MIXED.sequence_s + 18 * MIXED.prompt_token_s
    for ttft_s, keeps in ((first_s, True), (first_s - 0.01, False)):
        late = Progress(request("b", prompt_tokens=6, ttft_s=ttft_s))
        assert expect([ahead, late], now_s=0.0, costs=MIXED).kept_B[1] == keeps


def test_nobody_is_taken_who_costs_a_running_request_its_objective() -> None:
    scheduler = SloScheduler(costs=UNIT, max_batch=4)
    newcomers = [request("long", prompt_tokens=9), request("short", prompt_tokens=2)]
    # 4 tokens to go, its own and one of the newcomer's, and what is read: 4 + 1 + 2 seconds fit.
    strict = decoding("a", left=4, tpot_s=7 / 4)
    assert admitted(scheduler, newcomers, strict) == ["short"]
    assert admitted(scheduler, newcomers, decoding("a", left=4)) == ["long", "short"]
    # An objective that is lost in any case stands in nobody's way.
    lost = decoding("a", left=4, tpot_s=0.5)
    assert admitted(scheduler, newcomers, lost) == ["long", "short"]


def test_who_would_miss_its_own_objective_waits_for_a_better_moment() -> None:
    """The third slip: Algorithm 1 takes it, since it does no harm to those that run."""
    scheduler = SloScheduler(costs=UNIT, max_batch=4)
    busy = [decoding("a", left=50), decoding("b", left=50)]
    paced = request("c", expected_tokens=10, tpot_s=2.5)  # would get a token every 3 seconds
    assert admitted(scheduler, [paced], *busy) == []
    assert admitted(scheduler, [paced], busy[0]) == ["c"]


def test_in_danger_the_nearest_deadline_is_first_and_who_is_late_is_last() -> None:
    scheduler = SloScheduler(costs=UNIT, max_batch=2)
    waiting = [
        request("late", prompt_tokens=20, ttft_s=3.0),
        request("lenient", prompt_tokens=20, ttft_s=90.0),
        request("strict", prompt_tokens=20, ttft_s=45.0),
    ]
    assert admitted(scheduler, waiting) == ["strict", "lenient"]
    assert admitted(scheduler, waiting[:1]) == ["late"]


def test_the_limit_counts_tokens_and_not_requests() -> None:
    """The first slip: T starts as the tokens of those that run, and grows by the candidate's."""
    scheduler = SloScheduler(costs=UNIT, max_batch=9, max_tokens=30)
    waiting = [request(name, prompt_tokens=5, expected_tokens=5) for name in "abc"]
    assert admitted(scheduler, waiting) == ["a", "b", "c"]
    assert admitted(scheduler, waiting, decoding("z", left=9, made=1)) == ["a"]
    alone = [request("huge", prompt_tokens=99)]
    assert admitted(scheduler, alone) == ["huge"]  # or it would wait for ever
    assert admitted(scheduler, alone, decoding("z", left=1)) == []


def test_who_was_overtaken_often_enough_is_next_and_room_is_kept_for_it() -> None:
    scheduler = SloScheduler(costs=UNIT, max_batch=9, max_tokens=40, max_overtaken=3)
    waiting = [request("old", prompt_tokens=30), request("new", prompt_tokens=2, ttft_s=6.0)]
    strict = decoding("a", left=4, made=6, tpot_s=2.0)
    assert admitted(scheduler, waiting, strict) == ["new"]
    for overtaken, running, expected in (
        (2, [strict], ["new"]),
        (3, [strict], []),
        (3, [], ["old"]),
    ):
        taken = scheduler.admit(
            now_s=0.0, running=running, waiting=waiting, overtaken={"old": overtaken}
        )
        assert [one.name for one in taken] == expected


def test_overtaking_is_counted_by_later_arrivals() -> None:
    waiting = [request(name) for name in "abcd"]
    assert overtakes(waiting, [waiting[1], waiting[3]]) == {"a": 2, "c": 1}
    assert overtakes(waiting, waiting[:2]) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: request(prompt_tokens=0), "prompt_tokens=0"),
        (lambda: request(expected_tokens=0), "expected_tokens=0"),
        (lambda: request(ttft_s=0.0), "ttft_s=0.0"),
        (lambda: request(tpot_s=math.nan), "tpot_s=nan"),
        (lambda: request(load_s=-1.0), "load_s=-1.0"),
        (lambda: StepCosts(fixed_s=-1.0, sequence_s=1.0, prompt_token_s=1.0), "fixed_s=-1.0"),
        (lambda: StepCosts(fixed_s=1.0, sequence_s=math.nan, prompt_token_s=1.0), "sequence_s=nan"),
        (lambda: StepCosts(fixed_s=0.0, sequence_s=0.0, prompt_token_s=1.0), "above 0"),
        (lambda: SloScheduler(costs=UNIT, max_batch=0), "max_batch=0"),
        (lambda: SloScheduler(costs=UNIT, max_batch=1, max_tokens=0), "max_tokens=0"),
        (lambda: SloScheduler(costs=UNIT, max_batch=1, max_overtaken=-1), "max_overtaken=-1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@st.composite
def workloads(draw: st.DrawFn) -> list[Job]:
    """Requests in order of arrival, of any urgency, whose answers are as long as expected."""
    jobs, now_s = [], 0.0
    for index in range(draw(st.integers(1, 24))):
        now_s += draw(st.floats(0.0, 6.0))
        answer = draw(st.integers(1, 12))
        own = request(
            str(index),
            arrival_s=now_s,
            prompt_tokens=draw(st.integers(1, 40)),
            expected_tokens=answer,
            ttft_s=draw(st.sampled_from([2.0, 10.0, 60.0, math.inf])),
            tpot_s=draw(st.sampled_from([0.8, 1.5, 5.0, math.inf])),
            load_s=draw(st.sampled_from([0.0, 0.0, 1.0])),
        )
        jobs.append(Job(own, answer))
    return jobs


def fifo(batch: int) -> Any:
    return lambda moment: moment.waiting[: batch - len(moment.running)]


def serve(jobs: list[Job], admit: Any, *, batch: int) -> list[Served]:
    return simulate(jobs, admit, costs=MIXED, max_batch=batch)


@settings(deadline=None, max_examples=150)
@given(
    workloads(),
    st.integers(1, 4),
    st.integers(0, 6),
    st.sampled_from([60.0, math.inf]),
    st.booleans(),
)
def test_everybody_is_served_once_and_overtaken_by_few(
    jobs: list[Job], batch: int, max_overtaken: int, max_tokens: float, is_surprised: bool
) -> None:
    """No request is lost, doubled or starved, even where answers are not as long as expected."""
    scheduler = SloScheduler(
        costs=MIXED, max_batch=batch, max_tokens=max_tokens, max_overtaken=max_overtaken
    )
    if is_surprised:
        jobs = [Job(job.request, 1 + 3 * job.answer_tokens) for job in jobs]
    taken: Counter[str] = Counter()

    def admit(moment: Moment) -> list[SloRequest]:
        chosen = scheduler.admit(**moment._asdict())
        waiting = [one.name for one in moment.waiting]
        assert {one.name for one in chosen} <= set(waiting)
        assert len(chosen) + len(moment.running) <= batch
        assert chosen or moment.running
        taken.update(one.name for one in chosen)
        return chosen

    served = serve(jobs, admit, batch=batch)
    assert taken == Counter(job.request.name for job in jobs)
    for one in served:
        assert one.made_tokens == one.job.answer_tokens
        # Below the bound before its last overtaking, in which at most a batch can enter at once.
        assert one.overtaken <= max(0, max_overtaken - 1) + batch
        if max_overtaken == 0:
            assert one.overtaken == 0


@settings(deadline=None, max_examples=150)
@given(workloads(), st.integers(1, 4))
def test_where_arrival_order_keeps_every_first_token_in_time_it_is_kept_to_the_letter(
    jobs: list[Job], batch: int
) -> None:
    """Each request's objective is what first in, first out gave it, one full pass, and some more.

    Estimates are never later than what comes by more than a pass, whatever arrives meanwhile. The
    more, of any size, gives deadlines another order than arrivals have.
    """
    full_pass_s = MIXED.step_s(num_sequences=batch, num_prompt_tokens=MIXED.step_tokens)
    more_s = [job.request.ttft_s for job in jobs]
    jobs = [job._replace(request=_without_pace(job.request)) for job in jobs]
    before = serve(jobs, fifo(batch), batch=batch)
    jobs = [
        job._replace(request=_with_ttft(job.request, one.ttft_s + full_pass_s + more))
        for job, one, more in zip(jobs, before, more_s, strict=True)
    ]
    scheduler = SloScheduler(costs=MIXED, max_batch=batch)
    after = serve(jobs, lambda moment: scheduler.admit(**moment._asdict()), batch=batch)
    assert [one.end_s for one in after] == [one.end_s for one in before]
    assert all(one.keeps for one in after)


def _without_pace(own: SloRequest) -> SloRequest:
    return request(
        own.name,
        arrival_s=own.arrival_s,
        prompt_tokens=own.prompt_tokens,
        expected_tokens=own.expected_tokens,
    )


def _with_ttft(own: SloRequest, ttft_s: float) -> SloRequest:
    return request(
        own.name,
        arrival_s=own.arrival_s,
        prompt_tokens=own.prompt_tokens,
        expected_tokens=own.expected_tokens,
        ttft_s=ttft_s,
    )


@settings(deadline=None, max_examples=100)
@given(workloads(), st.integers(1, 4))
def test_without_objectives_it_is_first_in_first_out(jobs: list[Job], batch: int) -> None:
    jobs = [job._replace(request=_without_pace(job.request)) for job in jobs]
    scheduler = SloScheduler(costs=MIXED, max_batch=batch)
    after = serve(jobs, lambda moment: scheduler.admit(**moment._asdict()), batch=batch)
    assert after == serve(jobs, fifo(batch), batch=batch)
