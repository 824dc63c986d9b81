"""A batch that takes whom objectives say gives the answers of any other, and starves nobody."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.scheduler import StepCosts
from runtime.server.generation import GenerationEngine
from runtime.server.objectives import Objectives
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Piece
from runtime.server.slo import SLO, FIFOScheduler, SloBatchScheduler
from tests.runtime.server.fakes import Listener, generate, submit_one, wait_until

GREEDY = SamplingParams(temperature=0.0)
COSTS = StepCosts(fixed_s=8e-3, sequence_s=1e-3, prompt_token_s=2e-4)


@pytest.fixture
def make(model: Any, tokenizer: Any) -> Iterator[Any]:
    """Makes engines with this scheduler that are not started; they end with the test."""
    engines = []

    def make_engine(objectives: Objectives, **kwargs: Any) -> GenerationEngine:
        values = {"mode": "batched", "max_batch": 2, "scheduler": SLO, **kwargs}
        engine = GenerationEngine(
            model=model, tokenizer=tokenizer, objectives=objectives, max_queue=100, **values
        )
        engines.append(engine)
        return engine

    yield make_engine
    for engine in engines:
        if engine.state != "loading":
            engine.shutdown()


def alone(model: Any, tokenizer: Any, asks: list[dict[str, Any]]) -> list[list[int]]:
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    engine.start()
    try:
        return [generate(engine, **ask)[0] for ask in asks]
    finally:
        engine.shutdown()


def heard(listeners: list[Listener]) -> list[list[int]]:
    return [
        [piece.token_id for piece in listener.until_end() if isinstance(piece, Piece)]
        for listener in listeners
    ]


def test_urgent_requests_overtake_to_a_bound_and_every_answer_is_its_own(
    make: Any, model: Any, tokenizer: Any
) -> None:
    """Ten that can wait, then ten that cannot; all are there before the first step.

    Steps are said to take 3 s, so that whoever waits for another's end is too late.
    """
    asks: list[dict[str, Any]] = [
        {
            "prompt_ids": [20 + i, 30, 40 + i],
            "max_tokens": 4 + i % 3,
            "sampling": GREEDY,
            "ignore_eos": True,
        }
        for i in range(20)
    ]
    expected = alone(model, tokenizer, asks)
    slow = StepCosts(fixed_s=3.0, sequence_s=0.0, prompt_token_s=0.0)
    objectives = Objectives(ttft_s=3600.0, costs=slow, max_overtaken=4)
    engine = make(objectives)
    listeners = [Listener() for _ in asks]
    generations = [
        submit_one(engine, listener, **ask, ttft_s=10.0 if number >= 10 else None)
        for number, (ask, listener) in enumerate(zip(asks, listeners, strict=True))
    ]
    engine.start()
    assert heard(listeners) == expected
    started_s = [generation.timings.started_s or 0.0 for generation in generations]
    first = sorted(range(20), key=started_s.__getitem__)
    assert set(first[:2]) == {10, 11}  # the batch holds two
    # Four may overtake the first, and one more that enters with the fourth.
    assert first.index(0) <= 5
    wait_until(lambda: engine.num_running == engine.num_waiting == 0)
    assert objectives.num_overtaken > 0
    assert sum(objectives.counts.values()) == objectives.num_estimates == 20
    assert objectives.counts["", "kept"] >= 10  # an hour is enough for anybody


def test_pages_that_run_out_lose_nobody(make: Any, model: Any, tokenizer: Any) -> None:
    """Answers are expected to be short, so more are let in than there are pages in the end.

    Nor do all fit that are timed together when costs are measured: those that run are counted.
    """
    asks: list[dict[str, Any]] = [
        {"prompt_ids": [20 + i] * 40, "max_tokens": 60, "sampling": GREEDY, "ignore_eos": True}
        for i in range(5)
    ]
    expected = alone(model, tokenizer, asks)
    objectives = Objectives(ttft_s=60.0)
    engine = make(objectives, max_batch=8, max_context_tokens=128, kv_tokens=128)
    for _ in range(8):
        objectives._lengths.add("", 1)
    listeners = [Listener() for _ in asks]
    for ask, listener in zip(asks, listeners, strict=True):
        submit_one(engine, listener, **ask)
    engine.start()
    assert heard(listeners) == expected


def test_costs_that_are_not_given_are_measured_before_anything_is_served(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    objectives = Objectives(ttft_s=1.0)
    engine = make(objectives, max_batch=3)
    with caplog.at_level(logging.INFO):
        engine.start()
        wait_until(lambda: engine.state == "ready")
    assert objectives.is_ruling
    costs = objectives.costs
    assert costs is not None
    assert 1e-4 < costs.step_s(num_sequences=3, num_prompt_tokens=0) < 1.0
    assert costs.step_tokens == 256
    assert "A step costs" in caplog.text
    assert engine.prefix_tokens == (0, 0)  # the batch that serves has seen none of it
    assert len(generate(engine, [20, 30], max_tokens=3, ignore_eos=True)[0]) == 3


def test_one_after_the_other_objectives_are_counted_and_that_is_said(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    objectives = Objectives(ttft_s=60.0, tpot_s=1e-9, costs=COSTS)
    engine = make(objectives, mode="single")
    engine.start()
    generate(engine, [20, 30], max_tokens=1, ignore_eos=True)
    generate(engine, [20, 30], max_tokens=3, ignore_eos=True)
    assert objectives.counts == {("", "kept"): 1, ("", "pace_slow"): 1}
    assert not objectives.is_ruling
    assert "decide nothing" in caplog.text


def test_who_hangs_up_while_waiting_is_forgotten(make: Any) -> None:
    objectives = Objectives(ttft_s=60.0, costs=COSTS)
    engine = make(objectives, max_batch=1)
    engine.start()
    running, never, last = Listener(), Listener(), Listener()
    first = submit_one(engine, running, prompt_ids=[20], max_tokens=1000, ignore_eos=True)
    running.next()
    submit_one(engine, never, prompt_ids=[30]).cancel()
    submit_one(engine, last, prompt_ids=[40], max_tokens=2, ignore_eos=True)
    first.cancel()
    assert len(last.until_end()) == 2
    assert never.is_quiet()
    wait_until(lambda: not objectives._open)
    assert objectives.counts == {("", "kept"): 1}


@pytest.mark.parametrize(
    "wrong", [{"scheduler": "fifo"}, {"objectives": None}], ids=["scheduler", "objectives"]
)
def test_scheduler_and_objectives_go_together(
    model: Any, tokenizer: Any, wrong: dict[str, Any]
) -> None:
    values = {"scheduler": SLO, "objectives": Objectives(), "mode": "batched", **wrong}
    with pytest.raises(ValueError, match="'slo' needs them, and no other scheduler reads them"):
        GenerationEngine(model=model, tokenizer=tokenizer, **values)


def state(name: str, *, unread: int = 3) -> Any:
    return SimpleNamespace(request_id=name, remaining_prefill_tokens=[0] * unread)


def test_it_is_asked_whenever_somebody_has_come_or_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And otherwise only where nobody would run at all; who was let in stays so."""
    scheduler = SloBatchScheduler.__new__(SloBatchScheduler)
    scheduler._known, scheduler._let_in = set(), []
    waiting = [state("a"), state("b")]
    scheduler.active_requests = {}
    monkeypatch.setattr(FIFOScheduler, "_get_waiting_candidates", lambda self: waiting)

    def candidates() -> list[str]:
        return [one.request_id for one in scheduler._get_waiting_candidates()]

    assert candidates() == ["a", "b"]  # until somebody is to be asked
    asked: list[tuple[dict[str, int], list[str]]] = []
    answers: list[list[str]] = [["b"], [], ["c"], [], []]

    def decide(unread: Any, names: Any) -> list[str]:
        asked.append((dict(unread), list(names)))
        return answers[len(asked) - 1]

    scheduler.use_decisions(decide)
    assert candidates() == ["b"]
    assert candidates() == ["b"]  # for want of room in the pass
    assert asked == [({}, ["a", "b"])]
    scheduler.active_requests = {"b": state("b", unread=0)}
    waiting[:] = [state("a"), state("c")]
    assert candidates() == []
    assert asked[1:] == [({"b": 0}, ["a", "c"])]
    scheduler.active_requests = {}  # its pages were taken: it reads all of its tokens again
    waiting[:] = [state("a"), state("c"), state("b", unread=9)]
    assert candidates() == ["b"]
    assert len(asked) == 2
    waiting[:] = [state("a"), state("c")]  # it was cancelled
    assert candidates() == ["c"]
    assert asked[2:] == [({}, ["a", "c"])]
    waiting[:] = [state("a")]
    assert candidates() == []
    assert candidates() == []  # nobody would run: it is asked again and again
    assert asked[3:] == [({}, ["a"]), ({}, ["a"])]
