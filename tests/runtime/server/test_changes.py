"""A change is made once for who waits for it, and never for who has given up."""

import threading

import pytest

from runtime.server.changes import Change
from runtime.server.sequence import EngineUnavailableError


def raising(error: BaseException) -> Change:
    def call() -> None:
        raise error

    return Change(call)


def test_who_waits_is_told_that_it_is_made() -> None:
    made: list[str] = []
    change = Change(lambda: made.append("it"))
    change.make()
    change.wait(0)
    assert made == ["it"]


def test_what_goes_wrong_is_for_who_waits() -> None:
    change = raising(KeyError("nothing there"))
    change.make()
    with pytest.raises(KeyError, match="nothing there"):
        change.wait(0)


def test_one_that_was_not_begun_in_time_is_never_made() -> None:
    made: list[str] = []
    change = Change(lambda: made.append("it"))
    with pytest.raises(EngineUnavailableError, match="busy for too long"):
        change.wait(0)
    change.make()
    assert made == []


def test_one_that_is_under_way_at_the_end_of_patience_is_waited_for() -> None:
    is_begun, may_end = threading.Event(), threading.Event()

    def call() -> None:
        is_begun.set()
        may_end.wait(20)

    change = Change(call)
    maker = threading.Thread(target=change.make)
    maker.start()
    is_begun.wait(20)
    threading.Timer(0.05, may_end.set).start()
    change.wait(0)
    assert may_end.is_set()
    maker.join()


def test_a_thread_that_is_killed_meanwhile_tells_who_waits_and_ends() -> None:
    change = raising(SystemExit())
    with pytest.raises(SystemExit):
        change.make()
    with pytest.raises(EngineUnavailableError, match="the engine was interrupted"):
        change.wait(0)
