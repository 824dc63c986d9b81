"""Which objectives a request has, whom the batch takes by them, and what is counted in the end."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.scheduler import StepCosts
from runtime.server.objectives import AnswerLengths, Objectives, judge
from runtime.server.sequence import Generation, Timings
from tests.runtime.server.fakes import request

SLOW = StepCosts(fixed_s=0.0, sequence_s=1.0, prompt_token_s=1.0, step_tokens=100)


def decoding(key: str, *, prompt: int = 1, max_tokens: int = 4, **values: Any) -> Any:
    generation = Generation(
        request([7] * prompt, max_tokens=max_tokens, **values),
        index=0,
        max_tokens=max_tokens,
        sink=lambda piece: None,
        discard=lambda generation: None,
    )
    return SimpleNamespace(
        key=key, generation=generation, ids=[7] * prompt, num_prompt_tokens=prompt
    )


def ruling(max_batch: int = 4, max_tokens: int = 10**6, **values: Any) -> Objectives:
    objectives = Objectives(**values)
    objectives.rule(costs=SLOW, max_batch=max_batch, max_tokens=max_tokens)
    return objectives


def arrived(objectives: Objectives, *decodings: Any) -> list[str]:
    for one in decodings:
        objectives.arrive(one)
    return [one.key for one in decodings]


def ended(one: Any, outcome: Any, objectives: Objectives, *, ttft_s: float, tpot_s: float) -> None:
    """``one`` got all its tokens at this pace, and is over."""
    times, generation = one.generation.timings, one.generation
    generation.num_tokens = generation.max_tokens
    times.first_token_s = times.arrived_s + ttft_s
    times.last_token_s = times.first_token_s + tpot_s * (generation.num_tokens - 1)
    objectives.end(one, outcome)


def test_an_answer_is_expected_to_be_as_long_as_those_of_its_kind() -> None:
    lengths = AnswerLengths()
    assert lengths.expected("a", 10_000) == 256  # nothing is known
    assert lengths.expected("a", 9) == 9
    lengths.add("a", 10)
    lengths.add("a", 20)
    lengths.add("b", 60)
    assert lengths.expected("a", 100) == 15
    assert lengths.expected("c", 100) == 30  # of all, where there is none of its kind
    assert lengths.expected("b", 40) == 40
    for _ in range(256):
        lengths.add("a", 1)
    assert lengths.expected("a", 100) == 1  # what was long ago is forgotten


@pytest.mark.parametrize(
    ("num_tokens", "first_s", "last_s", "expected"),
    [
        (3, 1.0, 3.0, "kept"),
        (3, 1.1, 1.2, "first_token_late"),
        (3, 1.0, 3.1, "pace_slow"),
        (3, 1.1, 9.0, "first_token_late"),
        (1, 1.0, 1.0, "kept"),  # a single token has no pace
    ],
)
def test_a_verdict_is_about_the_first_token_and_the_mean_pace_after_it(
    num_tokens: int, first_s: float, last_s: float, expected: str
) -> None:
    timings = Timings(arrived_s=0.0, first_token_s=first_s, last_token_s=last_s)
    assert judge(timings, num_tokens, ttft_s=1.0, tpot_s=1.0) == expected


def test_a_request_without_objectives_of_its_own_has_the_servers() -> None:
    """At 5 s for its prompt and 1 s for a token, only who has 90 s does not have to be first."""
    objectives = ruling(max_batch=1, ttft_s=12.0)
    lenient = decoding("own", prompt=5, ttft_s=90.0)
    strict = decoding("servers", prompt=5)
    assert objectives.decide({}, arrived(objectives, lenient, strict)) == ["servers"]
    assert objectives.num_overtaken == 1


def test_without_objectives_the_order_is_that_of_arrival() -> None:
    objectives = ruling(max_batch=2)
    keys = arrived(objectives, *(decoding(key) for key in "abc"))
    assert objectives.decide({}, keys) == ["a", "b"]
    assert objectives.num_overtaken == 0


def test_who_has_been_taken_holds_its_place_and_who_ran_alone_has_one() -> None:
    objectives = ruling(max_batch=2)
    keys = arrived(objectives, decoding("a"), decoding("b"))
    assert objectives.decide({}, keys) == ["a", "b"]
    alone = decoding("alone")
    alone.generation.begin()
    late = arrived(objectives, decoding("c"), alone)
    assert objectives.decide({"a": 0}, late) == ["alone"]  # the second place is its own
    assert objectives.decide({"a": 0, "alone": 1}, ["c"]) == []


def test_a_batch_takes_no_more_tokens_than_the_cache_holds() -> None:
    objectives = ruling(max_tokens=30)
    keys = arrived(objectives, *(decoding(key, prompt=9, max_tokens=3) for key in "abc"))
    assert objectives.decide({}, keys) == ["a", "b"]


def test_nobody_is_overtaken_without_end() -> None:
    objectives = ruling(max_batch=1, max_overtaken=2)
    waiting = arrived(objectives, decoding("old", prompt=9, ttft_s=900.0))
    taken = []
    for number in range(4):
        waiting += arrived(objectives, decoding(f"new{number}", ttft_s=12.0))
        (key,) = objectives.decide({}, waiting)
        waiting.remove(key)
        taken.append(key)
    assert taken == ["new0", "new1", "old", "new2"]
    assert objectives.num_overtaken == 2


def test_what_is_over_is_counted_by_kind_and_verdict() -> None:
    objectives = ruling(ttft_s=1.0, tpot_s=1.0)
    told: list[tuple[str, Any, float, float]] = [
        ("a", "stop", 0.5, 0.5),
        ("a", "length", 0.5, 2.0),
        ("b", "stop", 2.0, 0.5),
        ("b", "error", 0.5, 0.5),
        ("b", "abort", 0.5, 0.5),
    ]
    for number, (task, outcome, ttft_s, tpot_s) in enumerate(told):
        one = decoding(str(number), task=task)
        objectives.arrive(one)
        ended(one, outcome, objectives, ttft_s=ttft_s, tpot_s=tpot_s)
    assert objectives.counts == {
        ("a", "kept"): 1,
        ("a", "pace_slow"): 1,
        ("b", "first_token_late"): 1,
        ("b", "failed"): 1,
    }
    assert objectives.num_estimates == 0  # nobody was asked about any of them


def test_who_has_no_objectives_keeps_and_misses_none() -> None:
    objectives = Objectives()
    one = decoding("a")
    objectives.arrive(one)
    ended(one, "stop", objectives, ttft_s=99.0, tpot_s=99.0)
    assert not objectives.counts
    assert not objectives.is_ruling


def test_estimates_are_held_against_what_came() -> None:
    """A prompt of 5 and its token take 6 s, 3 more tokens 3: 6 and 9 s from the decision."""
    objectives = ruling()
    one = decoding("a", prompt=5)
    assert objectives.decide({}, arrived(objectives, one)) == ["a"]
    decided_s = time.perf_counter()
    one.generation.timings.arrived_s = decided_s
    ended(one, "length", objectives, ttft_s=8.0, tpot_s=2.0)
    assert objectives.num_estimates == 1
    assert objectives.first_token_error_s == pytest.approx(2.0, abs=0.05)
    assert objectives.end_error_s == pytest.approx(5.0, abs=0.05)


def test_costs_follow_what_steps_take() -> None:
    """A step that takes twice what it should leaves half the time for everything."""
    objectives = ruling()
    assert objectives.cost_factor == 1.0
    for _ in range(1000):
        objectives.step(num_sequences=3, num_prompt_tokens=7, spent_s=2 * (3 + 7))
    assert objectives.cost_factor == pytest.approx(2.0, rel=1e-4)
    one = decoding("a", prompt=5)
    objectives.decide({}, arrived(objectives, one))
    one.generation.timings.arrived_s = time.perf_counter()
    ended(one, "length", objectives, ttft_s=8.0, tpot_s=2.0)
    assert objectives.first_token_error_s == pytest.approx(2 * 6.0 - 8.0, abs=0.05)
    assert objectives.costs == SLOW


def test_one_slow_step_is_no_slow_machine() -> None:
    objectives = ruling()
    objectives.step(num_sequences=1, num_prompt_tokens=0, spent_s=5.0)
    assert 1.0 < objectives.cost_factor < 1.1


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"ttft_s": 0.0}, "ttft_s=0.0"),
        ({"tpot_s": -1.0}, "tpot_s=-1.0"),
        ({"tpot_s": math.nan}, "tpot_s=nan"),
        ({"max_overtaken": -1}, "max_overtaken=-1"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Objectives(**wrong)
