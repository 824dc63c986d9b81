"""From a request's body to the sequences that the engine is to generate.

The only file that knows the tokenizer's way in: encoding and the chat template. Runs in a worker
thread, because a long prompt takes milliseconds to encode and other requests are streaming.
"""

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from runtime.server.errors import APIError
from runtime.server.protocol import (
    ChatCompletionBody,
    ChatMessageBody,
    CompletionBody,
    SamplingBody,
    ToolBody,
)
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import GenerationRequest
from runtime.server.tools import tool_obstacle

# OpenAI's default for completions; a chat answer may fill the context.
_COMPLETION_MAX_TOKENS = 16


def completion_requests(
    body: CompletionBody, *, tokenizer: Any, request_id: str, max_characters: int
) -> list[GenerationRequest]:
    """``n`` sequences for each prompt, prompt by prompt, as OpenAI numbers its choices."""
    prompts: list[tuple[list[int], str | None]] = [
        (
            encode(
                tokenizer,
                prompt,
                add_special_tokens=True,
                max_characters=max_characters,
                param="prompt",
            ),
            prompt,
        )
        if isinstance(prompt, str)
        else (prompt, None)
        for prompt in body.prompt
    ]
    check_min_tokens(body.min_tokens, body.max_tokens, default=_COMPLETION_MAX_TOKENS)
    return [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=ids,
            prompt_text=text,
            # For the prompt's probabilities alone the engine draws one token, which is not shown.
            max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
            default_max_tokens=_COMPLETION_MAX_TOKENS,
            sampling=sampling_of(body, choice, num_logprobs=body.logprobs),
            stops=body.stop,
            ignore_eos=body.ignore_eos,
            continues_prompt=True,
            prompt_logprobs=body.logprobs if body.echo else None,
            routed_experts=body.return_routed_experts,
        )
        for ids, text in prompts
        for choice in range(body.n)
    ]


def chat_requests(
    body: ChatCompletionBody, *, tokenizer: Any, request_id: str, max_characters: int
) -> list[GenerationRequest]:
    """``n`` sequences that answer the conversation.

    Raises:
        APIError: The model has no chat template, or the template refuses the conversation.
    """
    text = render(
        body.messages,
        tokenizer=tokenizer,
        tools=tools_shown(body.tools, body.tool_choice, tokenizer),
    )
    ids = encode(
        tokenizer,
        text,
        add_special_tokens=False,  # the template wrote them
        max_characters=max_characters,
        param="messages",
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    check_min_tokens(body.min_tokens, max_tokens, default=None)
    return [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=ids,
            prompt_text=text,
            max_tokens=max_tokens,
            sampling=sampling_of(
                body, choice, num_logprobs=body.top_logprobs if body.logprobs else None
            ),
            stops=body.stop,
            ignore_eos=body.ignore_eos,
            continues_prompt=False,
            routed_experts=body.return_routed_experts,
        )
        for choice in range(body.n)
    ]


def render(
    messages: Sequence[ChatMessageBody],
    *,
    tokenizer: Any,
    tools: Sequence[ToolBody] = (),
    add_generation_prompt: bool = True,
    param: str = "messages",
) -> str:
    """The conversation as the model's chat template writes it.

    Raises:
        APIError: The model has no chat template, or the template refuses the conversation, or
            there are tool calls in it and the template knows none; it names ``param``.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise APIError(
            "the model has no chat template: use /v1/completions with a prompt",
            param=param,
            code="no_chat_template",
        )
    calls = any(turn.tool_calls or turn.tool_call_id is not None for turn in messages)
    if calls and (obstacle := tool_obstacle(tokenizer)):
        raise APIError(
            f"{param}: tool calls are not implemented: {obstacle}",
            param=param,
            code="unsupported_parameter",
        )
    options: dict[str, Any] = {}
    if tools:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    try:
        text: str = tokenizer.apply_chat_template(
            [_turn(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except (TemplateError, TypeError, ValueError) as error:
        # A template may also trip over what it did not expect, such as a turn without content.
        raise APIError(
            f"{param}: the model's chat template refuses them: {error}", param=param
        ) from error
    return text


def tools_shown(
    tools: Sequence[ToolBody], choice: str | None, tokenizer: Any
) -> Sequence[ToolBody]:
    """The tools that the model is shown; APIError if its template knows none that we can read."""
    if not tools or choice == "none":
        return ()
    if obstacle := tool_obstacle(tokenizer):
        raise APIError(
            f"tools: not implemented: {obstacle}", param="tools", code="unsupported_parameter"
        )
    return tools


def sampling_of(
    body: SamplingBody, choice: int, *, num_logprobs: int | None = None
) -> SamplingParams:
    """How the choice of this number is drawn."""
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),  # vLLM spells "all" as -1, too
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
        # One seed for all choices would make them all the same.
        seed=None if body.seed is None else body.seed + choice,
        num_logprobs=num_logprobs,
    )


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token: a text of more than n times as many has over n tokens.

    Byte-level tokens count bytes, which makes the bound looser and not wrong.
    """
    return max(map(len, tokenizer.get_vocab()))


def encode(
    tokenizer: Any,
    text: str,
    *,
    add_special_tokens: bool,
    max_characters: int | None = None,
    param: str = "prompt",
) -> list[int]:
    """The text's token ids.

    Raises:
        APIError: The text has more than ``max_characters``: so many can be no prompt, and to find
            out how many tokens they are would take seconds of a core for every such request.
    """
    if max_characters is not None and len(text) > max_characters:
        raise APIError(
            f"{param}: {len(text)} characters do not fit the model's context, which holds "
            f"{max_characters} at most",
            param=param,
            code="context_length_exceeded",
        )
    # verbose=False: the engine checks the length and tells the client, the log needs no warning.
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return ids


def check_min_tokens(min_tokens: int, max_tokens: int | None, *, default: int | None) -> None:
    """Refuse an answer that would have to be longer than it may be."""
    limit = default if max_tokens is None else max_tokens
    if limit is not None and min_tokens > limit:
        raise APIError(
            f"min_tokens: {min_tokens} is more than the {limit} tokens that the answer may have",
            param="min_tokens",
            code="invalid_value",
        )


def _turn(message: ChatMessageBody) -> dict[str, Any]:
    """A message as templates expect it: no nulls, and arguments as objects, not as JSON."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
