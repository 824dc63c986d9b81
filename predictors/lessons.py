"""When a predictor learns from finished requests: at once, or beside those that are running.

A replay learns at once (`AtOnce`), so that it says the same every time. Where a model serves, the
request that comes next would wait for it: `Beside` has a thread for it with one place. While that
is taken, nothing is learned anew; what could have been stays with the predictor, which asks again
when the next request begins.

Knows nothing of predictors.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

logger = logging.getLogger(__name__)

Lesson = Callable[[], None]


class Lessons(Protocol):
    """Where lessons go.

    `take_one` says whether a lesson may be given now; only then `give` one. Both are called by one
    thread, that on which the predictor is asked.
    """

    def take_one(self) -> bool:
        """Whether a lesson may be given; raises what the last one has raised."""
        ...

    def give(self, lesson: Lesson) -> None:
        """Let it be done, now or later."""
        ...


class AtOnce:
    """Who asks waits."""

    def take_one(self) -> bool:
        """Always."""
        return True

    def give(self, lesson: Lesson) -> None:
        """Do it."""
        lesson()


class Beside:
    """A thread with one place: never two lessons at once, and none waits for another.

    Attributes:
        num_put_off: How often a lesson was not taken, because the one before was under way.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moecast-lessons")
        self._last: Future[None] | None = None
        self._is_over = False
        self.num_put_off = 0

    def take_one(self) -> bool:
        """See `Lessons`; never after `close`."""
        if self._is_over:
            return False
        if self._last is None:
            return True
        if not self._last.done():
            if not self.num_put_off:
                logger.warning(
                    "Learning from finished requests takes longer than they do: lessons are put "
                    "off until the one under way is done"
                )
            self.num_put_off += 1
            return False
        last, self._last = self._last, None
        last.result()
        return True

    def give(self, lesson: Lesson) -> None:
        """Begin it on the thread; returns at once."""
        self._last = self._pool.submit(lesson)

    def close(self) -> None:
        """Take no more; one that is under way is not waited for."""
        self._is_over = True
        self._pool.shutdown(wait=False)

    def join(self, timeout_s: float) -> bool:
        """Wait for the one that is under way; whether none is any more."""
        return self._last is None or not wait([self._last], timeout_s).not_done
