"""Lessons at once, or one at a time beside those who would wait for it."""

import logging
import threading

import pytest

from predictors.lessons import AtOnce, Beside

PATIENCE_S = 20.0


def test_at_once_who_asks_waits() -> None:
    done: list[int] = []
    lessons = AtOnce()
    assert lessons.take_one()
    lessons.give(lambda: done.append(1))
    assert done == [1]


def test_one_at_a_time_and_what_comes_meanwhile_is_put_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    may_end, threads = threading.Event(), []

    def lesson() -> None:
        threads.append(threading.get_ident())
        assert may_end.wait(PATIENCE_S)

    lessons = Beside()
    assert lessons.take_one()
    lessons.give(lesson)
    assert [lessons.take_one() for _ in range(3)] == [False] * 3
    assert lessons.num_put_off == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once
    assert not lessons.join(0.0)
    may_end.set()
    assert lessons.join(PATIENCE_S)
    assert lessons.take_one()
    lessons.give(lesson)
    assert lessons.join(PATIENCE_S)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert lessons.num_put_off == 3


def test_what_a_lesson_raises_is_told_to_who_asks_next() -> None:
    lessons = Beside()
    lessons.give(lambda: [][1])
    assert lessons.join(PATIENCE_S)
    with pytest.raises(IndexError):
        lessons.take_one()
    assert lessons.take_one()  # said once


def test_no_lesson_begins_after_the_end_and_none_is_waited_for() -> None:
    may_end = threading.Event()
    lessons = Beside()
    assert lessons.join(0.0)
    lessons.give(lambda: may_end.wait(PATIENCE_S) or None)
    lessons.close()
    assert not lessons.take_one()
    assert lessons.num_put_off == 0
    may_end.set()
    assert lessons.join(PATIENCE_S)
