"""The JSON bodies of completions and chats that come in, and what of them is refused.

A parameter that would change the answer and is not implemented is refused by name, unless it
stands at the value that changes nothing (``store: false``). Accepting and ignoring it would
give the user another answer than the one asked for. Only ``user`` is accepted and ignored, as
OpenAI itself does.

Knows nothing of tokenizers, models or HTTP.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from runtime.server.fields import (
    INT32_MAX,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_REPETITION_PENALTY,
    TEXT_OR_PARTS_SCHEMA,
    Biases,
    Flag,
    Integer,
    Number,
    PositiveInt,
    Prompts,
    Refused,
    Stops,
    Text,
    text_of_parts,
)


class Body(BaseModel):
    """Any body: what it does not know, it refuses."""

    model_config = ConfigDict(extra="forbid")


def needs_one_of(*names: str) -> Any:
    """A validator for a body in which exactly one of these parameters must be given."""

    def check(self: Any) -> Any:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise _at(names[0], f"give exactly one of {' and '.join(names)}")
        return self

    return model_validator(mode="after")(check)


class StreamOptions(Body):
    """What a stream carries besides the answer; ``continuous_usage_stats`` is vLLM's."""

    include_usage: Flag = False
    continuous_usage_stats: Flag = False

    include_obfuscation: Annotated[Any, Refused(False)] = None


class SamplingBody(Body):
    """How tokens are drawn; OpenAI's parameters and those that vLLM added."""

    temperature: Annotated[float, Number(1.0, ge=0, le=2)] = 1.0
    top_p: Annotated[float, Number(1.0, ge=0, le=1)] = 1.0
    top_k: Annotated[int, Integer(0, ge=-1, le=INT32_MAX)] = 0
    min_p: Annotated[float, Number(0.0, ge=0, le=1)] = 0.0
    frequency_penalty: Annotated[float, Number(0.0, ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Number(0.0, ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[
        float, Number(1.0, ge=1 / MAX_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)
    ] = 1.0
    logit_bias: Biases = {}
    min_tokens: Annotated[int, Integer(0, ge=0, le=INT32_MAX)] = 0
    ignore_eos: Flag = False
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = []


class GenerationBody(SamplingBody):
    """What completions and chats share; ``return_routed_experts`` is SGLang's."""

    model: Text
    n: Annotated[int, Integer(1, ge=1, le=MAX_CHOICES)] = 1
    stream: Flag = False
    stream_options: StreamOptions | None = None
    return_routed_experts: Flag = False
    user: Text | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise _at("stream_options", "only allowed with stream=true")
        if self.return_routed_experts and self.stream:
            raise _at("return_routed_experts", "only allowed with stream=false")
        return self


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    echo: Flag = False
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None

    best_of: Annotated[Any, Refused(1)] = None
    suffix: Annotated[Any, Refused("")] = None

    @model_validator(mode="after")
    def _check_lengths(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise _at("max_tokens", "0 is only allowed with echo=true; otherwise at least 1")
        if self.return_routed_experts and len(self.prompt) > 1:
            complaint = f"only allowed with 1 prompt, not {len(self.prompt)}"
            raise _at("return_routed_experts", complaint)
        return self


class FunctionBody(Body):
    """A function that the model may call; ``parameters`` is a JSON schema, shown to the model."""

    name: Annotated[str, Field(strict=True, pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    strict: Annotated[Any, Refused(False)] = None


class ToolBody(Body):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionBody


class CalledFunction(Body):
    """Which function was called with what: ``arguments`` is JSON in a string."""

    name: Text
    arguments: Text


class ToolCallBody(Body):
    """A call that the assistant made in an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    index: Annotated[int, Field(strict=True, ge=0)] | None = None


class ChatMessageBody(Body):
    """One turn; which roles exist is for the model's chat template to say."""

    role: Text
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: Text | None = None
    content: Annotated[
        str | None,
        WithJsonSchema({"anyOf": [*TEXT_OR_PARTS_SCHEMA["anyOf"], {"type": "null"}]}),
    ] = Field(default=None, validate_default=True)

    name: Annotated[Any, Refused()] = None
    refusal: Annotated[Any, Refused()] = None
    annotations: Annotated[Any, Refused([])] = None
    audio: Annotated[Any, Refused()] = None
    function_call: Annotated[Any, Refused()] = None

    @field_validator("content", mode="before")
    @classmethod
    def _read_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("tool_calls"):
            return None
        return text_of_parts(value)


Messages = Annotated[list[ChatMessageBody], Field(min_length=1)]
Tools = Annotated[list[ToolBody], BeforeValidator(lambda value: [] if value is None else value)]


class ChatCompletionBody(GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Integer(0, ge=0, le=MAX_LOGPROBS)] = 0
    tools: Tools = []
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Flag | None = None

    audio: Annotated[Any, Refused()] = None
    function_call: Annotated[Any, Refused("none")] = None
    functions: Annotated[Any, Refused([])] = None
    metadata: Annotated[Any, Refused({})] = None
    modalities: Annotated[Any, Refused(["text"])] = None
    prediction: Annotated[Any, Refused()] = None
    reasoning_effort: Annotated[Any, Refused()] = None
    response_format: Annotated[Any, Refused({"type": "text"})] = None
    service_tier: Annotated[Any, Refused("auto", "default")] = None
    store: Annotated[Any, Refused(False)] = None
    verbosity: Annotated[Any, Refused("medium")] = None
    web_search_options: Annotated[Any, Refused()] = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _refuse_choice(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise PydanticCustomError(
                "unsupported_parameter", "only 'none' and 'auto' are implemented by this server"
            )
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatCompletionBody":
        if self.top_logprobs and not self.logprobs:
            raise _at("top_logprobs", "only allowed with logprobs=true")
        if self.tools and self.parallel_tool_calls is False:
            raise _at("parallel_tool_calls", "false is not implemented by this server with tools")
        return self


def _at(param: str, message: str) -> PydanticCustomError:
    """A complaint about how one parameter goes with another, reported as being at that one."""
    return PydanticCustomError("wrong_combination", "{why}", {"param": param, "why": message})
