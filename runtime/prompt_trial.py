"""Whether the longest prompt fits beside the slots: tried before anything is served.

Knows how to say what to change; `runtime.prefill_chunks` measures.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from runtime.gpu_memory import context_of
from runtime.prefill_chunks import try_prefill

logger = logging.getLogger(__name__)


def check_prompt_fits(
    model: Any,
    tokens: int,
    *,
    slots: Sequence[int],
    planned_bytes: int | None,
    context_tokens: int | None = None,
) -> None:
    """Serve a prompt that means nothing, and look at the memory that it takes.

    Args:
        model: A transformers model that is ready to serve.
        tokens: The prompt's length; its KV cache is made for the whole context.
        slots: C of each layer, to be named.
        planned_bytes: Of everything on the device; a trial that takes more is logged.
        context_tokens: The whole context, which memory was planned for; None for `context_of`.

    Raises:
        ValueError: It does not fit.
    """
    context_tokens = context_of(model, context_tokens)
    try:
        trial = try_prefill(
            model, tokens, context_tokens=context_tokens, planned_bytes=planned_bytes
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"slots={sorted(set(slots))} leave no room for {tokens} tokens of a prompt and a "
            f"context of {context_tokens} ({error}): give fewer slots or a smaller budget_bytes, "
            "or serve shorter prompts only and give trial_tokens=0"
        ) from error
    logger.info("A prompt was tried: %s", trial)
    if (over := trial.peak_over_plan) is not None and over > 1:
        logger.warning(
            "The longest prompt takes %.1f %% more memory than budget_bytes says: give fewer slots "
            "than %s if that is too much",
            100 * (over - 1),
            sorted(set(slots)),
        )
