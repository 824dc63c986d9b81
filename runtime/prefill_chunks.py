"""Prompts longer than what memory was planned for: cut into chunks, and tried at start-up.

Knows nothing of experts: it says to transformers how long a chunk is, and looks at what a prompt
takes.

Shape letters: B requests · T tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


@contextmanager
def chunked_prefill(model: Any, chunk_tokens: int) -> Iterator[None]:
    """Let ``model.generate`` cut prompts into chunks of at most ``chunk_tokens`` tokens.

    That is transformers' own ``prefill_chunk_size``: the KV cache is carried from chunk to chunk.
    A bare ``model(ids)`` is one forward pass and is not cut.

    Raises:
        ValueError: ``chunk_tokens`` is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: must be at least 1")
    config = model.generation_config
    before = config.prefill_chunk_size
    config.prefill_chunk_size = chunk_tokens
    try:
        yield
    finally:
        config.prefill_chunk_size = before


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTrial:
    """What a prompt of the greatest length took.

    Attributes:
        tokens: Its length.
        spent_s: Of the prompt and one generated token.
        peak_bytes: Most memory of the device in use during it; None where it is not counted.
        planned_bytes: What was planned for everything on the device, if told.
    """

    tokens: int
    spent_s: float
    peak_bytes: int | None
    planned_bytes: int | None

    @property
    def peak_over_plan(self) -> float | None:
        """Peak over plan: above 1, the plan was too small; None where one is not known."""
        if self.peak_bytes is None or not self.planned_bytes:
            return None
        return self.peak_bytes / self.planned_bytes


@torch.no_grad()
def try_prefill(
    model: Any,
    tokens: int,
    *,
    context_tokens: int | None = None,
    planned_bytes: int | None = None,
) -> PrefillTrial:
    """Serve one prompt of ``tokens`` tokens, as `generate` would, and see what memory it takes.

    For start-up: what does not fit then fails then, not on the first long prompt. The cache learns
    from its meaningless ids, so it is tried before anything is served.

    Where prompts are read in chunks over a static KV cache, one chunk with a cache of the whole
    context takes as much memory as the longest prompt does, in a fraction of the time.

    Args:
        model: A transformers model that is ready to serve.
        tokens: Length of the prompt, ids drawn with a fixed seed.
        context_tokens: Positions that a static KV cache is made for, if more than the prompt needs.
        planned_bytes: Of everything on the device.

    Raises:
        ValueError: ``tokens`` is not positive.
        torch.OutOfMemoryError: It does not fit.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: must be at least 1")
    device = model.device
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocab_size, (1, tokens), generator=generator).to(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started_s = time.perf_counter()
    model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=max(1, (context_tokens or 0) - tokens),
        stopping_criteria=StoppingCriteriaList([_AfterOneToken()]),
        do_sample=False,
    )
    if on_gpu:
        torch.cuda.synchronize(device)
    return PrefillTrial(
        tokens=tokens,
        spent_s=time.perf_counter() - started_s,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        planned_bytes=planned_bytes,
    )


class _AfterOneToken(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation with its first token, whatever its cache has room for."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
