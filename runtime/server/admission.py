"""Which requests a model can serve at all, and how many tokens they may get."""

from runtime.server.sequence import ContextLengthError, GenerationRequest


def tokens_allowed(request: GenerationRequest, *, context_tokens: int, vocab_size: int) -> int:
    """How many tokens ``request`` may get.

    Args:
        request: What is asked.
        context_tokens: Prompt and answer together.
        vocab_size: Token ids are below it.

    Raises:
        ContextLengthError: Prompt and answer do not fit the context.
        ValueError: The prompt is empty or has an unknown token id, or max_tokens is below 1.
    """
    num_prompt, limit = len(request.prompt_ids), context_tokens
    if not num_prompt:
        raise ValueError("the prompt has no tokens: at least 1 is needed")
    for token_id in request.prompt_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id}: the model has 0..{vocab_size - 1}")
    room = limit - num_prompt
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens, the model's context {limit}: "
            f"at most {limit - 1} leave room for an answer"
        )
    if request.max_tokens is None:
        return min(room, request.default_max_tokens or room)
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens={request.max_tokens}: must be at least 1")
    if request.max_tokens > room:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens and {request.max_tokens} more are asked for: "
            f"{num_prompt + request.max_tokens} in all, the model's context is {limit}"
        )
    return request.max_tokens
