"""How ``/v1/responses`` is written: one object, or OpenAI's sequence of named events."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from runtime.server.errors import APIError
from runtime.server.forms import Counts
from runtime.server.prompts import encode, render
from runtime.server.protocol import ChatMessageBody
from runtime.server.responses import (
    IncompleteDetails,
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


def response_requests(
    body: ResponsesBody, *, tokenizer: Any, request_id: str
) -> list[GenerationRequest]:
    """The one sequence that answers the input; instructions are its system message.

    Raises:
        APIError: See `prompts.render`.
    """
    turns = [ChatMessageBody(role=turn.role, content=turn.content) for turn in body.input]
    if body.instructions is not None:
        turns.insert(0, ChatMessageBody(role="system", content=body.instructions))
    text = render(turns, tokenizer=tokenizer, param="input")
    return [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=encode(tokenizer, text, add_special_tokens=False),
            prompt_text=text,
            max_tokens=body.max_output_tokens,
            sampling=SamplingParams(temperature=body.temperature, top_p=body.top_p, seed=body.seed),
            ignore_eos=body.ignore_eos,
            continues_prompt=False,
        )
    ]


class ResponsesForm:
    """``/v1/responses``; see `forms.Form`.

    Args:
        body: What was asked, parts of which the answer repeats.
        response_id: The answer's id.
        created: Seconds since the epoch.
    """

    def __init__(self, body: ResponsesBody, *, response_id: str, created: int) -> None:
        self._body = body
        self._id = response_id
        self._item_id = f"msg_{response_id.removeprefix('resp_')}"
        self._created = created
        self._num_events = 0
        self._text = ""
        self._reason: FinishReason | None = None

    def whole(self, sequences: Sequence[Sequence[Piece]], counts: Counts) -> BaseModel:
        """See `Form`."""
        (pieces,) = sequences
        self._text = "".join(piece.text for piece in pieces)
        self._reason = pieces[-1].finish_reason
        return self._ended(counts)

    def opening(self) -> Iterator[str]:
        """See `Form`."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress", []))
        item = OutputMessage(id=self._item_id, status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._part_event("response.content_part.added", part=OutputText(text=""))

    def events(self, piece: Piece, counts: Counts) -> Iterator[str]:
        """See `Form`. One event per token, as in the other endpoints, be its text empty or not."""
        self._text += piece.text
        self._reason = piece.finish_reason
        yield self._part_event("response.output_text.delta", delta=piece.text, logprobs=[])

    def closing(self, counts: Counts) -> Iterator[str]:
        """See `Form`."""
        response = self._ended(counts)
        (item,) = response.output
        yield self._part_event("response.output_text.done", text=self._text, logprobs=[])
        yield self._part_event("response.content_part.done", part=item.content[0])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response.status}", response=response)

    def failure(self, error: APIError) -> Iterator[str]:
        """See `Form`."""
        response = self._response("failed", [])
        details = error.body["error"]
        response.error = ResponseError(
            code=details["code"] or details["type"], message=details["message"]
        )
        yield self._event("response.failed", response=response)

    def _ended(self, counts: Counts) -> Response:
        status: Status = "incomplete" if self._reason == "length" else "completed"
        item = OutputMessage(id=self._item_id, status=status, content=[OutputText(text=self._text)])
        response = self._response(status, [item])
        if status == "incomplete":
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        response.usage = ResponseUsage(
            input_tokens=counts.prompt,
            output_tokens=counts.generated,
            total_tokens=counts.prompt + counts.generated,
        )
        return response

    def _response(self, status: Status, output: list[OutputMessage]) -> Response:
        body = self._body
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,
            model=body.model,
            output=output,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            temperature=body.temperature,
            top_p=body.top_p,
            user=body.user,
        )

    def _part_event(self, name: str, **fields: Any) -> str:
        """An event of the one text in the one item."""
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> str:
        data = {"type": name, "sequence_number": self._num_events}
        for key, value in fields.items():
            data[key] = value.model_dump() if isinstance(value, BaseModel) else value
        self._num_events += 1
        return f"event: {name}\ndata: {json.dumps(data)}\n\n"
