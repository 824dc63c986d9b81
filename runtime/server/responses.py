"""``POST /v1/responses`` in its basic form: what comes in, and the objects that go out.

Nothing is stored, so every request brings its whole conversation; what needs a store is refused by
name, and so are tools other than functions. Knows nothing of tokenizers, models or HTTP.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from runtime.server.fields import (
    INT32_MAX,
    TEXT_OR_PARTS_SCHEMA,
    Flag,
    Number,
    PositiveInt,
    Refused,
    Text,
    text_of_parts,
)
from runtime.server.protocol import Body, FunctionBody

_ITEMS = ("message", "function_call", "function_call_output")
_PARTS = ("input_text", "output_text", "text")
_PLAIN_TEXT = {"format": {"type": "text"}}


def _input(value: Any) -> Any:
    """A string is one message of the user, and an item without a type is a message."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of items that is not empty")
    items = []
    for item in value:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind not in _ITEMS:
            raise ValueError(f"an item of type {kind!r}: only {', '.join(_ITEMS)} are implemented")
        items.append({**item, "type": kind})
    return items


def _tools(value: Any) -> Any:
    for tool in value if isinstance(value, list) else []:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise PydanticCustomError(
                "unsupported_parameter",
                "a tool of type {kind}: not implemented by this server; only functions are",
                {"kind": repr(kind)},
            )
    return [] if value is None else value


class InputMessage(Body):
    """One message of the input; an answer's output items may be given back as they came."""

    type: Literal["message"] = "message"
    role: Text
    content: Annotated[
        str,
        BeforeValidator(lambda value: text_of_parts(value, kinds=_PARTS)),
        WithJsonSchema(
            {
                "anyOf": [
                    TEXT_OR_PARTS_SCHEMA["anyOf"][0],
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "type": {"enum": list(_PARTS)},
                                "text": {"type": "string"},
                                "annotations": {"enum": [None, []]},
                                "logprobs": {"enum": [None, []]},
                            },
                            "required": ["type", "text"],
                            "additionalProperties": False,
                        },
                    },
                ]
            }
        ),
    ]
    id: Text | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class InputCall(Body):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    id: Text | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class InputCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text
    id: Text | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class ResponseTool(FunctionBody):
    """A function that the model may call."""

    type: Literal["function"]


class ResponseStreamOptions(Body):
    """What a stream carries besides: nothing that is implemented."""

    include_obfuscation: Annotated[Any, Refused(False)] = None


class ResponsesBody(Body):
    """Body of ``POST /v1/responses``; ``top_k`` and ``seed`` are extensions."""

    model: Text
    input: Annotated[
        list[Annotated[InputMessage | InputCall | InputCallOutput, Field(discriminator="type")]],
        BeforeValidator(_input),
    ]
    instructions: Text | None = None
    max_output_tokens: PositiveInt | None = None
    temperature: Annotated[float, Number(1.0, ge=0, le=2)] = 1.0
    top_p: Annotated[float, Number(1.0, ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(strict=True, ge=-INT32_MAX, le=INT32_MAX)] | None = None
    ignore_eos: Flag = False
    stream: Flag = False
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[ResponseTool], BeforeValidator(_tools)] = []
    tool_choice: Annotated[Any, Refused("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Refused(True)] = None
    metadata: Annotated[dict[Text, Text], Field(max_length=16)] | None = None
    # These three, like `user`, change nothing of an answer.
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    background: Annotated[Any, Refused(False)] = None
    conversation: Annotated[Any, Refused()] = None
    include: Annotated[Any, Refused([])] = None
    max_tool_calls: Annotated[Any, Refused()] = None
    previous_response_id: Annotated[Any, Refused()] = None
    prompt: Annotated[Any, Refused()] = None
    reasoning: Annotated[Any, Refused()] = None
    service_tier: Annotated[Any, Refused("auto", "default")] = None
    store: Annotated[Any, Refused(False)] = None
    text: Annotated[Any, Refused({}, _PLAIN_TEXT)] = None
    top_logprobs: Annotated[Any, Refused(0)] = None
    truncation: Annotated[Any, Refused("disabled")] = None


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """A text in an answer's output."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call that the model asks for; ``arguments`` is JSON in a string."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class InputDetails(BaseModel):
    """Nothing is cached between requests."""

    cached_tokens: int = 0


class OutputDetails(BaseModel):
    """Reasoning is not told apart from the answer."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens read and written by one request."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer ends before its end."""

    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class TextFormat(BaseModel):
    """The only format of text."""

    type: Literal["text"] = "text"


class TextSettings(BaseModel):
    """How the text is formatted: it is not."""

    format: TextFormat = TextFormat()


class Response(BaseModel):
    """Answer of ``POST /v1/responses``, and what most of its events carry."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: None = None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: TextSettings = TextSettings()
    tool_choice: Literal["none", "auto"] = "auto"
    tools: list[dict[str, Any]] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
