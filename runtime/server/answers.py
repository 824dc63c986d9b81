"""Answers on their way to the client: whole, or as server-sent events.

The engine calls from its own thread; an `Answer` carries its pieces over to the event loop, and
cancels what is left when the client goes away.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from runtime.server.errors import APIError, internal_error
from runtime.server.forms import Counts, Form
from runtime.server.sequence import EngineUnavailableError, Failure, Generation, Piece


class Inbox:
    """Carries what the engine says to the event loop that made the inbox."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[Piece | Failure] = asyncio.Queue()

    def put(self, said: Piece | Failure) -> None:
        """Hand over, from any thread. Nobody reads any more once the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._said.put_nowait, said)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    async def get(self) -> Piece | Failure:
        """Wait for the next."""
        return await self._said.get()


class Answer:
    """The sequences of one HTTP request on their way to the client.

    Args:
        generations: What the engine is generating, pieces going to ``inbox``.
        inbox: Made on this event loop.
        form: How the endpoint writes.
        num_prompt_tokens: Over all prompts, each counted once.
        limit_s: Seconds that the answer may take from now on; None for no limit.
        on_close: Called once, when nobody waits for the answer any more.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        inbox: Inbox,
        *,
        form: Form,
        num_prompt_tokens: int,
        limit_s: float | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._generations = generations
        self._inbox = inbox
        self._form = form
        self._counts = Counts(num_prompt_tokens, 0)
        self._limit_s = limit_s
        self._deadline_s = None if limit_s is None else time.monotonic() + limit_s
        self._on_close = on_close
        self._closed = False

    def close(self) -> None:
        """Stop what is not done; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for generation in self._generations:
            generation.cancel()
        self._on_close()

    async def whole(self) -> BaseModel:
        """Wait for all sequences; the complete object.

        Raises:
            APIError: A sequence failed, or time is up.
        """
        sequences: list[list[Piece]] = [[] for _ in self._generations]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                sequences[piece.index].append(piece)
        return self._form.whole(sequences, self._counts)

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events, as the form writes them; a failure is one, too."""
        for event in self._form.opening():
            yield event
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    for event in self._form.events(piece, self._counts):
                        yield event
        except APIError as error:
            last = self._form.failure(error)
        else:
            last = self._form.closing(self._counts)
        for event in last:
            yield event

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        num_open = len(self._generations)
        try:
            while num_open:
                said = await self._next()
                if isinstance(said, Failure):
                    raise as_api_error(said.error)
                num_open -= said.finish_reason is not None
                self._counts = self._counts._replace(generated=self._counts.generated + 1)
                yield said
        finally:
            self.close()

    async def _next(self) -> Piece | Failure:
        left_s = None if self._deadline_s is None else self._deadline_s - time.monotonic()
        try:
            return await asyncio.wait_for(self._inbox.get(), left_s)
        except TimeoutError:
            raise APIError(
                f"the answer is not complete after {self._limit_s:g} s, which is all that this "
                "server gives a request: ask for fewer tokens",
                status=408,
                code="request_timeout",
            ) from None


class EventSource(Protocol):
    """Whatever tells events until it is closed."""

    def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events."""
        ...

    def close(self) -> None:
        """Nobody listens any more."""
        ...


class EventStream(StreamingResponse):
    """Sends a source's events, and closes it however the sending ends.

    The generator of events cannot do that alone: if the client is gone before the first event, it
    is never begun, and so never closed.
    """

    def __init__(self, source: EventSource) -> None:
        super().__init__(
            source.events(),
            media_type="text/event-stream",
            # Proxies must not hold tokens back.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send (an ASGI application)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._source.close()


async def whole_unless_gone(answer: Answer, receive: Receive) -> BaseModel | None:
    """The complete answer, or None (and cancelled) if the client hangs up before.

    Args:
        answer: What is being generated.
        receive: The request's ASGI channel, its body read: the next message is the hang-up.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer.whole()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        answer.close()
        answering.cancel()
        leaving.cancel()


def as_api_error(error: Exception) -> APIError:
    """What the client is told of a sequence that failed."""
    if isinstance(error, EngineUnavailableError):
        return APIError(str(error), status=503, type="server_error", code="unavailable")
    return internal_error(error)
