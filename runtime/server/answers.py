"""From the engine's pieces to OpenAI objects: whole, or as server-sent events.

The engine calls from its own thread; an `Answer` carries its pieces over to the event loop, and
cancels what is left when the client goes away.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from runtime.server.errors import APIError, internal_error
from runtime.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    Completion,
    CompletionChoice,
    StreamOptions,
    Usage,
)
from runtime.server.sequence import (
    EngineUnavailableError,
    Failure,
    FinishReason,
    Generation,
    Piece,
)

_DONE = "data: [DONE]\n\n"


class Form(Protocol):
    """How one endpoint writes its answers; `CompletionForm` and `ChatForm` are the two."""

    id_prefix: str

    def whole(
        self, texts: Sequence[str], reasons: Sequence[FinishReason], **head: Any
    ) -> BaseModel:
        """The complete answer, one choice per text; ``head`` is id, created, model, usage."""
        ...

    def chunk(self, piece: Piece | None, *, is_first: bool, **head: Any) -> BaseModel:
        """One event for ``piece``, or the one without choices that carries the usage."""
        ...


class CompletionForm:
    """``/v1/completions``."""

    id_prefix = "cmpl-"

    def whole(
        self, texts: Sequence[str], reasons: Sequence[FinishReason], **head: Any
    ) -> BaseModel:
        """See `Form`."""
        choices = [
            CompletionChoice(index=i, text=text, finish_reason=reason)
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return Completion(choices=choices, **head)

    def chunk(self, piece: Piece | None, *, is_first: bool, **head: Any) -> BaseModel:
        """See `Form`."""
        choices = (
            []
            if piece is None
            else [
                CompletionChoice(
                    index=piece.index, text=piece.text, finish_reason=piece.finish_reason
                )
            ]
        )
        return Completion(choices=choices, **head)


class ChatForm:
    """``/v1/chat/completions``. The role comes with the first token, so chunks equal tokens."""

    id_prefix = "chatcmpl-"

    def whole(
        self, texts: Sequence[str], reasons: Sequence[FinishReason], **head: Any
    ) -> BaseModel:
        """See `Form`."""
        choices = [
            ChatChoice(index=i, message=ChatMessage(content=text), finish_reason=reason)
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return ChatCompletion(choices=choices, **head)

    def chunk(self, piece: Piece | None, *, is_first: bool, **head: Any) -> BaseModel:
        """See `Form`."""
        choices = []
        if piece is not None:
            role = {"role": "assistant"} if is_first else {}
            choices = [
                ChatChunkChoice(
                    index=piece.index,
                    delta={**role, "content": piece.text},
                    finish_reason=piece.finish_reason,
                )
            ]
        return ChatChunk(choices=choices, **head)


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
        head: id, created and model of every object.
        num_prompt_tokens: Over all prompts, each counted once.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        inbox: Inbox,
        *,
        form: Form,
        head: dict[str, Any],
        num_prompt_tokens: int,
    ) -> None:
        self._generations = generations
        self._inbox = inbox
        self._form = form
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens

    def cancel(self) -> None:
        """Stop what is not done."""
        for generation in self._generations:
            generation.cancel()

    async def whole(self) -> BaseModel:
        """Wait for all sequences; the complete object.

        Raises:
            APIError: A sequence failed.
        """
        texts = [""] * len(self._generations)
        reasons: dict[int, FinishReason] = {}
        num_pieces = 0
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                num_pieces += 1
                texts[piece.index] += piece.text
                if piece.finish_reason is not None:
                    reasons[piece.index] = piece.finish_reason
        in_order = [reasons[i] for i in range(len(texts))]
        return self._form.whole(texts, in_order, usage=self._usage(num_pieces), **self._head)

    async def events(self, options: StreamOptions) -> AsyncGenerator[str, None]:
        """Server-sent events: one per token, then the usage if wanted, then ``[DONE]``.

        With ``include_usage`` the events of tokens say ``usage: null``, or with
        ``continuous_usage_stats`` the usage so far; else they do not mention it. A failure arrives
        as an event in the error form, since the status line has long been sent.
        """
        left_out = None if options.include_usage else {"usage"}
        begun: set[int] = set()
        num_pieces = 0
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    num_pieces += 1
                    is_first = piece.index not in begun
                    begun.add(piece.index)
                    usage = self._usage(num_pieces) if options.continuous_usage_stats else None
                    chunk = self._form.chunk(piece, is_first=is_first, usage=usage, **self._head)
                    yield f"data: {chunk.model_dump_json(exclude=left_out)}\n\n"
        except APIError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        else:
            if options.include_usage:
                usage = self._usage(num_pieces)
                chunk = self._form.chunk(None, is_first=False, usage=usage, **self._head)
                yield f"data: {chunk.model_dump_json()}\n\n"
        yield _DONE

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        num_open = len(self._generations)
        try:
            while num_open:
                said = await self._inbox.get()
                if isinstance(said, Failure):
                    raise as_api_error(said.error)
                num_open -= said.finish_reason is not None
                yield said
        finally:
            self.cancel()

    def _usage(self, num_generated: int) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_generated,
            total_tokens=self._num_prompt_tokens + num_generated,
        )


class EventStream(StreamingResponse):
    """Sends an answer's events, and cancels it however the sending ends.

    The generator of events cannot do that alone: if the client is gone before the first event, it
    is never begun, and so never closed.
    """

    def __init__(self, answer: Answer, options: StreamOptions) -> None:
        super().__init__(
            answer.events(options),
            media_type="text/event-stream",
            # Proxies must not hold tokens back.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send (an ASGI application)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


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
        answer.cancel()
        answering.cancel()
        leaving.cancel()


def as_api_error(error: Exception) -> APIError:
    """What the client is told of a sequence that failed."""
    if isinstance(error, EngineUnavailableError):
        return APIError(str(error), status=503, type="server_error", code="unavailable")
    return internal_error(error)
