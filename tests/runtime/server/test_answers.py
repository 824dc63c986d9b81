"""What is generated for a client that has gone is cancelled, whenever it went."""

import asyncio
from typing import Any

import pytest

from runtime.server.answers import Answer, EventStream, Inbox, whole_unless_gone
from runtime.server.forms import CompletionForm
from runtime.server.logprobs import LogprobTexts
from runtime.server.protocol import StreamOptions
from runtime.server.sequence import Failure, Generation, Piece
from tests.runtime.server.fakes import request

HEAD = {"id": "cmpl-1", "created": 0, "model": "m"}


def answer(
    inbox: Inbox, *, num_sequences: int = 1, include_usage: bool = True, **kwargs: Any
) -> tuple[Answer, list[Generation]]:
    generations = [
        Generation(request(), index=i, max_tokens=9, sink=inbox.put, discard=lambda _: None)
        for i in range(num_sequences)
    ]
    form = CompletionForm(
        head=HEAD,
        options=StreamOptions(include_usage=include_usage),
        texts=LogprobTexts(tokenizer=None),
    )
    return Answer(generations, inbox, form=form, num_prompt_tokens=1, **kwargs), generations


async def hung_up() -> Any:
    return {"type": "http.disconnect"}


async def never(_: Any = None) -> Any:
    await asyncio.Event().wait()


def test_a_client_that_goes_before_the_first_event_is_noticed() -> None:
    """The generator of events is then never begun, and its own clean-up never runs."""

    async def send_to_nobody() -> list[Generation]:
        reply, generations = answer(Inbox())
        stream = EventStream(reply)
        await stream({"type": "http"}, hung_up, never)
        return generations

    assert all(generation.cancelled for generation in asyncio.run(send_to_nobody()))


def test_a_client_that_waits_for_the_whole_and_goes_is_noticed() -> None:
    async def answer_nobody() -> tuple[Any, list[Generation]]:
        reply, generations = answer(Inbox(), num_sequences=2)
        return await whole_unless_gone(reply, hung_up), generations

    whole, generations = asyncio.run(answer_nobody())
    assert whole is None
    assert all(generation.cancelled for generation in generations)


def test_one_failure_ends_the_answer_and_cancels_the_other_sequences() -> None:
    async def fail_second() -> tuple[list[str], list[Generation]]:
        inbox = Inbox()
        reply, generations = answer(inbox, num_sequences=3)
        inbox.put(Piece(0, 7, "a", "stop"))
        inbox.put(Failure(1, RuntimeError("no memory")))
        return [event async for event in reply.events()], generations

    events, generations = asyncio.run(fail_second())
    assert [("no memory" in event, "[DONE]" in event) for event in events] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert all(generation.cancelled for generation in generations)


def test_what_comes_after_the_loop_has_ended_is_dropped() -> None:
    async def make() -> Inbox:
        return Inbox()

    asyncio.run(make()).put(Piece(0, 7, "a", None))


@pytest.mark.parametrize("include_usage", [True, False])
def test_only_those_who_ask_see_the_usage(include_usage: bool) -> None:
    async def stream() -> list[str]:
        inbox = Inbox()
        reply, _ = answer(inbox, include_usage=include_usage)
        inbox.put(Piece(0, 7, "a", "stop"))
        return [event async for event in reply.events()]

    events = asyncio.run(stream())
    assert len(events) == (3 if include_usage else 2)
    assert all(("usage" in event) == include_usage for event in events[:-1])
