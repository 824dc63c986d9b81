"""Makes an update about twice a second while somebody listens, and hands it to all who do.

Nothing is looked at while nobody listens. A listener who reads slowly gets the newest update and
misses those between, so nothing piles up.

Knows nothing of what an update says. Everything runs on the event loop but the looking itself.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from fastapi.concurrency import run_in_threadpool

from runtime.server.errors import APIError

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 10


class Live:
    """Looks at something at intervals, for a bounded number of listeners.

    Args:
        look: Makes an update, one line of text; called on a thread of its own.
        rest: Called when nobody listens any more, likewise.
        period_s: Between an update and the next look.
        max_listeners: One more is refused.
    """

    def __init__(
        self,
        look: Callable[[], str],
        *,
        rest: Callable[[], None] = lambda: None,
        period_s: float = 0.5,
        max_listeners: int = 16,
    ) -> None:
        self._look, self._rest = look, rest
        self._period_s, self._max_listeners = period_s, max_listeners
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_listeners(self) -> int:
        """How many listen now."""
        return len(self._listeners)

    def join(self) -> "Listener":
        """Begin to listen; whoever gets a listener closes it.

        Raises:
            APIError: There are too many, or the server is shutting down.
        """
        if self._is_closed:
            raise APIError(
                "the server is shutting down", status=503, type="server_error", code="unavailable"
            )
        if len(self._listeners) >= self._max_listeners:
            raise APIError(
                f"{len(self._listeners)} pages watch already, which is all that this server takes: "
                "close one",
                status=429,
                type="rate_limit_error",
                code="too_many_listeners",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        listener = Listener(self._listeners.discard)
        self._listeners.add(listener)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return listener

    def close(self) -> None:
        """End all streams, and take no new ones: they would hold up a shutdown for ever."""
        self._is_closed = True
        self._end_all()

    async def _run(self) -> None:
        try:
            while self._listeners:
                update = await run_in_threadpool(self._look)
                for listener in self._listeners:
                    listener.tell(update)
                await asyncio.sleep(self._period_s)
        except Exception:
            logger.exception("The dashboard could not be updated; its streams are ended")
            self._end_all()
        finally:
            self._task = None
        await run_in_threadpool(self._rest)

    def _end_all(self) -> None:
        for listener in list(self._listeners):
            listener.tell(None)


class Listener:
    """One stream of updates, as server-sent events.

    Args:
        leave: Called when it is closed.
    """

    def __init__(self, leave: "Callable[[Listener], None]") -> None:
        self._leave = leave
        self._newest: str | None = None
        self._has_news = asyncio.Event()

    def tell(self, update: str | None) -> None:
        """Hand over an update in place of one that was not read yet; None ends the stream."""
        self._newest = update
        self._has_news.set()

    async def events(self) -> AsyncGenerator[str, None]:
        """The updates as they come."""
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            if self._newest is None:
                return
            yield f"data: {self._newest}\n\n"

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        self._leave(self)
