"""The JSON bodies of the OpenAI API: what comes in, what goes out, and what is refused.

A parameter that would change the answer and is not implemented is refused by name, unless it
stands at the value that changes nothing (``logprobs: false``). Accepting and ignoring it would
give the user another answer than the one asked for. Only ``user`` is accepted and ignored, as
OpenAI itself does.

Knows nothing of tokenizers, models or HTTP.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from runtime.server.sequence import FinishReason

MAX_STOPS = 4
MAX_CHOICES = 128


def _only(*no_ops: Any) -> BeforeValidator:
    """Refuse every value of a parameter that is not implemented, but those that change nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in no_ops:
            raise PydanticCustomError(
                "unsupported_parameter",
                "not implemented by this server; leave it out{or_at}",
                {"or_at": "".join(f", or at {no_op!r}" for no_op in no_ops)},
            )
        return value

    return BeforeValidator(check)


def _null_is(default: Any) -> BeforeValidator:
    """A null stands for the default, as it does at OpenAI."""
    return BeforeValidator(lambda value: default if value is None else value)


def _stops(value: Any) -> Any:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings: at most {MAX_STOPS} are allowed")
    if "" in stops:
        raise ValueError("a stop string is empty: every one needs at least one character")
    return stops


def _prompts(value: Any) -> Any:
    """Four forms become two: texts, or lists of token ids."""
    if isinstance(value, str):
        return [_valid_text(value)]
    if isinstance(value, list) and value:
        if all(isinstance(text, str) for text in value):
            return [_valid_text(text) for text in value]
        if _are_ids(value):
            return [value]
        if all(isinstance(ids, list) and _are_ids(ids) for ids in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, "
        "none of the lists empty"
    )


def _are_ids(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def _content(value: Any) -> Any:
    """A string, or text parts, which become lines of one string."""
    if isinstance(value, str):
        return _valid_text(value)
    if not isinstance(value, list):
        raise ValueError('must be a string or a list of {"type": "text", "text": ...} parts')
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"a part of type {kind!r}: only 'text' parts are implemented")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part must have the keys type and text, text being a string")
    return _valid_text("\n".join(part["text"] for part in value))


def _valid_text(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: lone surrogate at character {error.start}") from None
    return text


class StreamOptions(BaseModel):
    """What a stream carries besides the answer; ``continuous_usage_stats`` is vLLM's."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Annotated[StrictBool, _null_is(False)] = False
    continuous_usage_stats: Annotated[StrictBool, _null_is(False)] = False

    include_obfuscation: Annotated[Any, _only(False)] = None


_PositiveInt = Annotated[int, Field(strict=True, ge=1)]


class GenerationBody(BaseModel):
    """What both kinds of request share. ``top_k`` and ``ignore_eos`` are vLLM's."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    temperature: Annotated[
        float, Field(strict=True, ge=0, le=2, allow_inf_nan=False), _null_is(1.0)
    ] = 1.0
    top_p: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), _null_is(1.0)] = (
        1.0
    )
    top_k: Annotated[int, Field(strict=True, ge=-1), _null_is(0)] = 0
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), _null_is(1)] = 1
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stream: Annotated[StrictBool, _null_is(False)] = False
    stream_options: StreamOptions | None = None
    ignore_eos: Annotated[StrictBool, _null_is(False)] = False
    user: StrictStr | None = None

    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    repetition_penalty: Annotated[Any, _only(1)] = None
    min_tokens: Annotated[Any, _only(0)] = None
    min_p: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: _PositiveInt | None = None

    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    logprobs: Annotated[Any, _only()] = None
    suffix: Annotated[Any, _only("")] = None


class ChatMessageBody(BaseModel):
    """One turn; which roles exist is for the model's chat template to say."""

    model_config = ConfigDict(extra="forbid")

    role: StrictStr
    content: Annotated[str, BeforeValidator(_content)]

    name: Annotated[Any, _only()] = None
    refusal: Annotated[Any, _only()] = None
    annotations: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None
    tool_call_id: Annotated[Any, _only()] = None


class ChatCompletionBody(GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessageBody], Field(min_length=1)]
    max_completion_tokens: _PositiveInt | None = None
    max_tokens: _PositiveInt | None = None

    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only("none")] = None
    functions: Annotated[Any, _only([])] = None
    logprobs: Annotated[Any, _only(False)] = None
    metadata: Annotated[Any, _only({})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None
    prediction: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only()] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: Annotated[Any, _only(False)] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Annotated[Any, _only([])] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    verbosity: Annotated[Any, _only("medium")] = None
    web_search_options: Annotated[Any, _only()] = None


class ModelCard(BaseModel):
    """One entry of ``GET /v1/models``; ``max_model_len`` is vLLM's, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moecast"
    max_model_len: int


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(BaseModel):
    """Tokens read and written by one request, over all of its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One answer of a completion, or a piece of one."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Answer of ``POST /v1/completions``; the chunks of a stream have the same form."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """A piece of one answer; ``delta`` names the role in the first piece only."""

    index: int
    delta: dict[str, str]
    logprobs: None = None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None
