"""The JSON objects that go out: OpenAI's, and vLLM's where OpenAI has none.

Fields that only those see who asked for them (routed experts, tool calls) are left out while None;
all others are always there, as clients expect. Knows nothing of how they are filled.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, SkipValidation

Reason = Literal["stop", "length", "tool_calls"]
# [T, L, K] as nested lists. Not validated: a long prompt has a million numbers, all our own.
RoutedExperts = Annotated[
    SkipValidation[list[list[list[int]]] | None],
    Field(default=None, exclude_if=lambda value: value is None),
]


class ModelCard(BaseModel):
    """One entry of ``GET /v1/models``; ``max_model_len`` is vLLM's, in tokens.

    ``mode`` is ours: "lossless", or the name of what makes answers others than the model's own.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moecast"
    max_model_len: int
    mode: str = "lossless"


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of ``GET /health``; ``message`` says why the state is "failed"."""

    status: Literal["loading", "ready", "draining", "stopped", "failed"]
    message: str | None = Field(default=None, exclude_if=lambda value: value is None)


class Version(BaseModel):
    """Answer of ``GET /version``."""

    version: str


class TokenizeAnswer(BaseModel):
    """Answer of ``POST /tokenize`` (vLLM's)."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    """Answer of ``POST /detokenize`` (vLLM's)."""

    prompt: str


class Usage(BaseModel):
    """Tokens read and written by one request, over all of its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """How probable the tokens of one choice were, as four lists of the same length."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One answer of a completion, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None
    routed_experts: RoutedExperts


class Completion(BaseModel):
    """Answer of ``POST /v1/completions``; the chunks of a stream have the same form."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    prompt_routed_experts: RoutedExperts


class TokenLogprob(BaseModel):
    """How probable one token was; ``bytes`` of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprobs(TokenLogprob):
    """That, and the most probable tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """How probable the tokens of an answer were."""

    content: list[ChatTokenLogprobs]
    refusal: None = None


class FunctionCall(BaseModel):
    """What the model wants to be called; ``arguments`` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """One call that the model asks for; ``index`` counts them in a stream."""

    index: int | None = Field(default=None, exclude_if=lambda value: value is None)
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda value: value is None)


class ChatChoice(BaseModel):
    """One answer of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason
    routed_experts: RoutedExperts


class ChatCompletion(BaseModel):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_routed_experts: RoutedExperts


class ChatDelta(BaseModel):
    """What one event adds; the role comes in the first one only."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda value: value is None)
    content: str
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda value: value is None)


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None


class ErrorDetails(BaseModel):
    """What is wrong: for people (``message``) and for programs (the rest)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetails
