"""How completions and chats are written: whole, or as server-sent events.

One form writes one answer; what differs between the endpoints is here and nothing else.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel

from runtime.server.errors import APIError
from runtime.server.logprobs import LogprobTexts
from runtime.server.objects import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Reason,
    Usage,
)
from runtime.server.protocol import StreamOptions
from runtime.server.sequence import GenerationRequest, Piece
from runtime.server.tools import ToolCallReader

_DONE = "data: [DONE]\n\n"


class Counts(NamedTuple):
    """Tokens of one answer so far, over all its prompts and choices."""

    prompt: int
    generated: int


class Form(Protocol):
    """How one endpoint writes one answer.

    `whole` for those who wait; for a stream `opening`, then `events` of each piece, then `closing`,
    or `failure` in its place. All of the latter give server-sent events, ready to send.
    """

    def whole(self, sequences: Sequence[Sequence[Piece]], counts: Counts) -> BaseModel:
        """The complete answer, from all pieces of each sequence."""
        ...

    def opening(self) -> Iterator[str]:
        """Before the first piece."""
        ...

    def events(self, piece: Piece, counts: Counts) -> Iterator[str]:
        """For one piece; ``counts`` has it in."""
        ...

    def closing(self, counts: Counts) -> Iterator[str]:
        """After the last piece of the last sequence."""
        ...

    def failure(self, error: APIError) -> Iterator[str]:
        """The status line has long been sent, so a failure is an event."""
        ...


class _ChunkForm(ABC):
    """What completions and chats have in common: a stream of chunks, all alike.

    With ``include_usage`` the chunks say ``usage: null``, or with ``continuous_usage_stats`` the
    usage so far, and one more chunk without choices has the usage; else they do not mention it.

    Args:
        head: id, created and model of every object.
        options: What a stream carries besides.
    """

    def __init__(self, *, head: Mapping[str, Any], options: StreamOptions) -> None:
        self._head = dict(head)
        self._options = options

    def opening(self) -> Iterator[str]:
        """See `Form`."""
        return iter(())

    def closing(self, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        if self._options.include_usage:
            yield self._event(self._chunk([], usage_of(counts)))
        yield _DONE

    def failure(self, error: APIError) -> Iterator[str]:
        """See `Form`."""
        yield f"data: {json.dumps(error.body)}\n\n"
        yield _DONE

    @abstractmethod
    def _chunk(self, choices: list[Any], usage: Usage | None) -> BaseModel: ...

    def _usage_so_far(self, counts: Counts) -> Usage | None:
        return usage_of(counts) if self._options.continuous_usage_stats else None

    def _event(self, chunk: BaseModel) -> str:
        left_out = None if self._options.include_usage else {"usage"}
        return f"data: {chunk.model_dump_json(exclude=left_out)}\n\n"


class CompletionForm(_ChunkForm):
    """``/v1/completions``.

    Args:
        head: See `_ChunkForm`.
        options: See `_ChunkForm`.
        texts: Writes tokens.
        echoed: What was submitted, if prompts come before the answers; or None.
        answers: Whether the answer is shown at all: with ``max_tokens=0`` the engine's one token
            is not.
    """

    def __init__(
        self,
        *,
        head: Mapping[str, Any],
        options: StreamOptions,
        texts: LogprobTexts,
        echoed: Sequence[GenerationRequest] | None = None,
        answers: bool = True,
    ) -> None:
        super().__init__(head=head, options=options)
        self._texts = texts
        self._echoed = echoed
        self._answers = answers
        self._num_shown: dict[int, int] = {}  # characters of a choice's text, in a stream

    def whole(self, sequences: Sequence[Sequence[Piece]], counts: Counts) -> BaseModel:
        """See `Form`."""
        choices = [self._choice(pieces) for pieces in sequences]
        prompt_routing, _ = routing_of(sequences[0])
        return Completion(
            choices=choices,
            usage=usage_of(self._counted(counts)),
            prompt_routed_experts=prompt_routing,
            **self._head,
        )

    def events(self, piece: Piece, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        choice = self._choice([piece])
        yield self._event(self._chunk([choice], self._usage_so_far(self._counted(counts))))

    def closing(self, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        return super().closing(self._counted(counts))

    def _chunk(self, choices: list[Any], usage: Usage | None) -> BaseModel:
        return Completion(choices=choices, usage=usage, **self._head)

    def _counted(self, counts: Counts) -> Counts:
        return counts if self._answers else counts._replace(generated=0)

    def _choice(self, pieces: Sequence[Piece]) -> CompletionChoice:
        """One choice, or what these pieces add to it."""
        index = pieces[0].index
        text, logprobs = "", None
        if index not in self._num_shown and self._echoed is not None:
            text, logprobs = self._echo(pieces[0])
        offset = self._num_shown.get(index, 0) + len(text)
        reason: Reason | None = pieces[-1].finish_reason
        if self._answers:
            told = [piece.logprobs for piece in pieces]
            if told[0] is not None:
                answered = self._texts.completion(
                    told,
                    [piece.token_id for piece in pieces],
                    [piece.text for piece in pieces],
                    offset=offset,
                )
                logprobs = _joined(logprobs, answered)
            text += "".join(piece.text for piece in pieces)
        else:
            reason = "length"
        self._num_shown[index] = self._num_shown.get(index, 0) + len(text)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            routed_experts=routing_of(pieces)[1],
        )

    def _echo(self, first: Piece) -> tuple[str, CompletionLogprobs | None]:
        assert self._echoed is not None
        request = self._echoed[first.index]
        text = request.prompt_text
        if text is None:
            text = self._texts.text(request.prompt_ids)
        if first.prompt_logprobs is None:
            return text, None
        return text, self._texts.prompt(request.prompt_ids, first.prompt_logprobs, text=text)


class ChatForm(_ChunkForm):
    """``/v1/chat/completions``. The role comes with the first token, so chunks equal tokens.

    Args:
        head: See `_ChunkForm`.
        options: See `_ChunkForm`.
        texts: Writes tokens.
        calls_tools: Whether tool calls in the text are read as such.
    """

    def __init__(
        self,
        *,
        head: Mapping[str, Any],
        options: StreamOptions,
        texts: LogprobTexts,
        calls_tools: bool = False,
    ) -> None:
        super().__init__(head=head, options=options)
        self._texts = texts
        self._calls_tools = calls_tools
        self._readers: dict[int, ToolCallReader] = {}  # of the choices that have begun to stream

    def whole(self, sequences: Sequence[Sequence[Piece]], counts: Counts) -> BaseModel:
        """See `Form`."""
        choices = []
        for index, pieces in enumerate(sequences):
            reader = ToolCallReader(reads=self._calls_tools)
            read = [reader.push(piece.text) for piece in pieces]
            read.append(reader.finish())
            text = "".join(shown for shown, _ in read)
            calls = [call for _, calls in read for call in calls]
            for call in calls:
                call.index = None  # only streams count them
            reason = pieces[-1].finish_reason
            assert reason is not None
            message = ChatMessage(content=text if text or not calls else None)
            if calls:
                message.tool_calls = calls
            choices.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._texts.chat(pieces),
                    finish_reason="tool_calls" if calls and reason == "stop" else reason,
                    routed_experts=routing_of(pieces)[1],
                )
            )
        return ChatCompletion(
            choices=choices,
            usage=usage_of(counts),
            prompt_routed_experts=routing_of(sequences[0])[0],
            **self._head,
        )

    def events(self, piece: Piece, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        is_first = piece.index not in self._readers
        reader = self._readers.setdefault(piece.index, ToolCallReader(reads=self._calls_tools))
        text, calls = reader.push(piece.text)
        reason: Reason | None = piece.finish_reason
        if reason is not None:
            rest, more = reader.finish()
            text, calls = text + rest, [*calls, *more]
            if reader.num_calls and reason == "stop":
                reason = "tool_calls"
        choice = ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(
                role="assistant" if is_first else None, content=text, tool_calls=calls or None
            ),
            logprobs=self._texts.chat([piece]),
            finish_reason=reason,
        )
        yield self._event(self._chunk([choice], self._usage_so_far(counts)))

    def _chunk(self, choices: list[Any], usage: Usage | None) -> BaseModel:
        return ChatChunk(choices=choices, usage=usage, **self._head)


def usage_of(counts: Counts) -> Usage:
    """The counts as OpenAI's object."""
    return Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.generated,
        total_tokens=counts.prompt + counts.generated,
    )


def routing_of(pieces: Sequence[Piece]) -> tuple[Any, Any]:
    """Experts of the prompt and of the answer as nested lists; None twice if not asked for.

    The answer's last token was never read, so it has no experts (as in vLLM).
    """
    routed = [p.routed_experts_TLK for p in pieces if p.routed_experts_TLK is not None]
    if not routed:
        return None, None
    prompt_TLK, *answer = routed
    none_TLK = np.zeros((0, *prompt_TLK.shape[1:]), np.int16)
    return prompt_TLK.tolist(), np.concatenate([none_TLK, *answer]).tolist()


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs) -> CompletionLogprobs:
    if first is None:
        return second
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )
