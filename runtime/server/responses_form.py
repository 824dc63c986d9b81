"""How ``/v1/responses`` is written: one object, or OpenAI's sequence of named events."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from runtime.server.errors import APIError
from runtime.server.forms import Counts
from runtime.server.objects import ToolCall
from runtime.server.prompts import encode, render, tools_shown
from runtime.server.protocol import (
    CalledFunction,
    ChatMessageBody,
    FunctionBody,
    ToolBody,
    ToolCallBody,
)
from runtime.server.responses import (
    IncompleteDetails,
    InputCall,
    InputCallOutput,
    OutputCall,
    OutputMessage,
    OutputText,
    Response,
    ResponseError,
    ResponsesBody,
    ResponseUsage,
    Status,
)
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import FinishReason, GenerationRequest, Piece
from runtime.server.tools import ToolCallReader

# The name of an event and what it carries besides its type and number.
_Event = tuple[str, dict[str, Any]]


def response_requests(
    body: ResponsesBody, *, tokenizer: Any, request_id: str, max_characters: int
) -> list[GenerationRequest]:
    """The one sequence that answers the input; instructions are its system message.

    Raises:
        APIError: See `prompts.render` and `prompts.tools_shown`.
    """
    tools = [
        ToolBody(
            type="function",
            function=FunctionBody(
                name=tool.name, description=tool.description, parameters=tool.parameters
            ),
        )
        for tool in body.tools
    ]
    text = render(
        _turns(body),
        tokenizer=tokenizer,
        tools=tools_shown(tools, body.tool_choice, tokenizer),
        param="input",
    )
    return [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=encode(
                tokenizer,
                text,
                add_special_tokens=False,
                max_characters=max_characters,
                param="input",
            ),
            prompt_text=text,
            max_tokens=body.max_output_tokens,
            sampling=SamplingParams(temperature=body.temperature, top_p=body.top_p, seed=body.seed),
            ignore_eos=body.ignore_eos,
            continues_prompt=False,
        )
    ]


def _turns(body: ResponsesBody) -> list[ChatMessageBody]:
    """The input as a chat's messages; calls in a row are one turn."""
    turns = []
    if body.instructions is not None:
        turns.append(ChatMessageBody(role="system", content=body.instructions))
    for item in body.input:
        if isinstance(item, InputCall):
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCallBody(id=item.call_id, function=function)
            if turns and turns[-1].tool_calls:
                turns[-1].tool_calls.append(call)
            else:
                turns.append(ChatMessageBody(role="assistant", tool_calls=[call], content=""))
        elif isinstance(item, InputCallOutput):
            turns.append(
                ChatMessageBody(role="tool", tool_call_id=item.call_id, content=item.output)
            )
        else:
            turns.append(ChatMessageBody(role=item.role, content=item.content))
    return turns


class ResponsesForm:
    """``/v1/responses``; see `forms.Form`.

    The output is a list of items, texts and calls; at most one is open, the text being said.
    Without tools there is one text, open from the start, and an event for every token as in the
    other endpoints; with tools a text begins with its first character.

    Args:
        body: What was asked, parts of which the answer repeats.
        response_id: The answer's id.
        created: Seconds since the epoch.
    """

    def __init__(self, body: ResponsesBody, *, response_id: str, created: int) -> None:
        self._body = body
        self._id = response_id
        self._created = created
        self._calls_tools = bool(body.tools) and body.tool_choice != "none"
        self._reader = ToolCallReader(reads=self._calls_tools)
        self._num_events = 0
        self._output: list[OutputMessage | OutputCall] = []
        self._open: OutputMessage | None = None
        self._reason: FinishReason | None = None

    def whole(self, sequences: Sequence[Sequence[Piece]], counts: Counts) -> BaseModel:
        """See `Form`. What a stream would say is done, and not written."""
        (pieces,) = sequences
        _exhaust(self._begun())
        for piece in pieces:
            _exhaust(self._said(piece))
        _exhaust(self._closed(self._status()))
        return self._ended(counts)

    def opening(self) -> Iterator[str]:
        """See `Form`."""
        for name in ("response.created", "response.in_progress"):
            yield self._write(name, {"response": self._response("in_progress")})
        for event in self._begun():
            yield self._write(*event)

    def events(self, piece: Piece, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        for event in self._said(piece):
            yield self._write(*event)

    def closing(self, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        for event in self._closed(self._status()):
            yield self._write(*event)
        response = self._ended(counts)
        yield self._write(f"response.{response.status}", {"response": response})

    def failure(self, error: APIError) -> Iterator[str]:
        """See `Form`."""
        response = self._response("failed")
        details = error.body["error"]
        response.error = ResponseError(
            code=details["code"] or details["type"], message=details["message"]
        )
        yield self._write("response.failed", {"response": response})

    def _begun(self) -> Iterator[_Event]:
        if not self._calls_tools:
            yield from self._opened()

    def _said(self, piece: Piece) -> Iterator[_Event]:
        """What a piece adds: text, and calls that are complete with it."""
        self._reason = piece.finish_reason
        text, calls = self._reader.push(piece.text)
        if piece.finish_reason is not None:
            rest, more = self._reader.finish()
            text, calls = text + rest, [*calls, *more]
        if text and self._open is None:
            yield from self._opened()
        if self._open is not None:
            self._open.content[0].text += text
            yield "response.output_text.delta", {**self._place(), "delta": text, "logprobs": []}
        for call in calls:
            yield from self._closed("completed")
            yield from self._called(call)

    def _opened(self) -> Iterator[_Event]:
        """A new text."""
        item = OutputMessage(id=self._item_id("msg"), status="in_progress", content=[])
        yield "response.output_item.added", {"output_index": len(self._output), "item": item}
        self._open = item.model_copy(update={"content": [OutputText(text="")]})
        self._output.append(self._open)
        yield "response.content_part.added", {**self._place(), "part": OutputText(text="")}

    def _closed(self, status: Status) -> Iterator[_Event]:
        """The end of the text that is open, if any."""
        item = self._open
        if item is None:
            return
        part = item.content[0]
        item.status = status
        yield "response.output_text.done", {**self._place(), "text": part.text, "logprobs": []}
        yield "response.content_part.done", {**self._place(), "part": part}
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}
        self._open = None

    def _called(self, call: ToolCall) -> Iterator[_Event]:
        """A call, which is complete when it is found."""
        item = OutputCall(
            id=self._item_id("fc"),
            call_id=call.id,
            name=call.function.name,
            arguments=call.function.arguments,
            status="completed",
        )
        index = len(self._output)
        self._output.append(item)
        begun = item.model_copy(update={"arguments": "", "status": "in_progress"})
        place = {"item_id": item.id, "output_index": index}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield "response.function_call_arguments.delta", {**place, "delta": item.arguments}
        yield (
            "response.function_call_arguments.done",
            {**place, "name": item.name, "arguments": item.arguments},
        )
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _status(self) -> Status:
        return "incomplete" if self._reason == "length" else "completed"

    def _ended(self, counts: Counts) -> Response:
        response = self._response(self._status())
        response.output = self._output
        if response.status == "incomplete":
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        response.usage = ResponseUsage(
            input_tokens=counts.prompt,
            output_tokens=counts.generated,
            total_tokens=counts.prompt + counts.generated,
        )
        return response

    def _response(self, status: Status) -> Response:
        body = self._body
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,
            model=body.model,
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            temperature=body.temperature,
            tool_choice=body.tool_choice or "auto",
            tools=[tool.model_dump() for tool in body.tools],
            top_p=body.top_p,
            user=body.user,
        )

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{len(self._output)}_{self._id.removeprefix('resp_')}"

    def _place(self) -> dict[str, Any]:
        """Where the text is that is open."""
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._output) - 1, "content_index": 0}

    def _write(self, name: str, fields: dict[str, Any]) -> str:
        data = {"type": name, "sequence_number": self._num_events}
        for key, value in fields.items():
            data[key] = value.model_dump() if isinstance(value, BaseModel) else value
        self._num_events += 1
        return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _exhaust(events: Iterator[_Event]) -> None:
    deque(events, maxlen=0)
