"""From a request's body to the sequences that the engine is to generate.

The only file that knows the tokenizer's way in: encoding and the chat template. Runs in a worker
thread, because a long prompt takes milliseconds to encode and other requests are streaming.
"""

from typing import Any

from jinja2 import TemplateError

from runtime.server.errors import APIError
from runtime.server.protocol import ChatCompletionBody, CompletionBody, GenerationBody
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import GenerationRequest

# OpenAI's default for completions; a chat answer may fill the context.
_COMPLETION_MAX_TOKENS = 16


def completion_requests(
    body: CompletionBody, *, tokenizer: Any, request_id: str
) -> list[GenerationRequest]:
    """``n`` sequences for each prompt, prompt by prompt, as OpenAI numbers its choices."""
    prompts: list[tuple[list[int], str | None]] = [
        (_encode(tokenizer, prompt, add_special_tokens=True), prompt)
        if isinstance(prompt, str)
        else (prompt, None)
        for prompt in body.prompt
    ]
    return [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=ids,
            prompt_text=text,
            max_tokens=body.max_tokens,
            default_max_tokens=_COMPLETION_MAX_TOKENS,
            sampling=_sampling(body, choice),
            stops=body.stop,
            ignore_eos=body.ignore_eos,
            continues_prompt=True,
        )
        for ids, text in prompts
        for choice in range(body.n)
    ]


def chat_requests(
    body: ChatCompletionBody, *, tokenizer: Any, request_id: str
) -> list[GenerationRequest]:
    """``n`` sequences that answer the conversation.

    Raises:
        APIError: The model has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise APIError(
            f"model {body.model!r} has no chat template: use /v1/completions with a prompt",
            param="messages",
            code="no_chat_template",
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in body.messages]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise APIError(
            f"messages: the model's chat template refuses them: {error}", param="messages"
        ) from error
    ids = _encode(tokenizer, text, add_special_tokens=False)  # the template wrote them
    return [
        GenerationRequest(
            request_id=request_id,
            prompt_ids=ids,
            prompt_text=text,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            sampling=_sampling(body, choice),
            stops=body.stop,
            ignore_eos=body.ignore_eos,
            continues_prompt=False,
        )
        for choice in range(body.n)
    ]


def _sampling(body: GenerationBody, choice: int) -> SamplingParams:
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),  # vLLM spells "all" as -1, too
        # One seed for all choices would make them all the same.
        seed=None if body.seed is None else body.seed + choice,
    )


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    # verbose=False: the engine checks the length and tells the client, the log needs no warning.
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return ids
