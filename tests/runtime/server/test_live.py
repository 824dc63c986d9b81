"""Updates are made only while somebody listens, for so many listeners, and never pile up."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from runtime.server.errors import APIError
from runtime.server.live import Listener, Live
from tests.runtime.server.fakes import WAIT_S


class Looks:
    """Counts how often it looked and rested; says the number of the look."""

    def __init__(self, *, breaks_at: int | None = None) -> None:
        self.num_looks = self.num_rests = 0
        self.threads: set[int] = set()
        self._breaks_at = breaks_at

    def __call__(self) -> str:
        self.num_looks += 1
        self.threads.add(threading.get_ident())
        if self.num_looks == self._breaks_at:
            raise RuntimeError("cannot see")
        return f'{{"number":{self.num_looks}}}'

    def rest(self) -> None:
        self.num_rests += 1


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, WAIT_S))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def read(listener: Listener, number: int) -> list[str]:
    events = listener.events()
    return [await anext(events) for _ in range(number)]


def test_nothing_is_looked_at_while_nobody_listens() -> None:
    async def story() -> None:
        looks = Looks()
        live = Live(looks, rest=looks.rest, period_s=0.001)
        await asyncio.sleep(0.05)
        assert looks.num_looks == 0
        listener = live.join()
        await read(listener, 3)
        assert threading.get_ident() not in looks.threads  # the event loop never waits for a look
        listener.close()
        await until(lambda: looks.num_rests == 1)
        seen = looks.num_looks
        await asyncio.sleep(0.05)
        assert (looks.num_looks, looks.num_rests) == (seen, 1)
        again = live.join()
        await read(again, 2)
        assert looks.num_looks >= seen + 2
        again.close()
        await until(lambda: looks.num_rests == 2)

    run(story())


def test_one_look_serves_all_who_listen() -> None:
    async def story() -> None:
        looks = Looks()
        live = Live(looks, period_s=0.02)
        listeners = [live.join() for _ in range(5)]
        said = await asyncio.gather(*(read(listener, 2) for listener in listeners))
        assert said == [['data: {"number":1}\n\n', 'data: {"number":2}\n\n']] * 5
        for listener in listeners:
            listener.close()

    run(story())


def test_who_reads_slowly_gets_the_newest_and_misses_the_rest() -> None:
    async def story() -> None:
        looks = Looks()
        live = Live(looks, period_s=0.001)
        slow = live.join()
        await until(lambda: looks.num_looks >= 20)
        (event,) = await read(slow, 1)
        assert int(event.removeprefix('data: {"number":').rstrip("}\n")) >= 19
        slow.close()

    run(story())


def test_one_listener_too_many_is_refused_until_another_leaves() -> None:
    async def story() -> None:
        live = Live(Looks(), period_s=0.001, max_listeners=2)
        first, second = live.join(), live.join()
        with pytest.raises(APIError, match="2 pages watch already") as refused:
            live.join()
        assert refused.value.status == 429
        first.close()
        first.close()
        third = live.join()
        assert live.num_listeners == 2
        second.close()
        third.close()

    run(story())


def test_a_shutdown_ends_every_stream_and_takes_no_new_one() -> None:
    async def story() -> None:
        live = Live(Looks(), period_s=60)
        events = live.join().events()
        await anext(events)
        live.close()
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        with pytest.raises(APIError, match="shutting down"):
            live.join()

    run(story())


def test_a_look_that_breaks_ends_the_streams_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        looks = Looks(breaks_at=2)
        live = Live(looks, rest=looks.rest, period_s=0.001)
        listener = live.join()
        with caplog.at_level(logging.ERROR):
            said = [event async for event in listener.events()]
        assert len(said) <= 1
        assert "cannot see" in caplog.text
        listener.close()
        again = live.join()  # and whoever comes back is served
        await read(again, 1)
        again.close()

    run(story())
