"""Choosing the next token from the model's logits, with transformers' own processors.

Knows nothing of requests, text or the model. Shape letters: T tokens; V is the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Below this, logits / temperature may overflow float32; the limit of the softmax is the argmax.
_GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    Args:
        temperature: Not negative; 0 (or below 1e-5) takes the most probable token.
        top_p: In [0, 1]: the smallest set of tokens with at least this probability is kept.
        top_k: How many of the most probable tokens are kept; 0 keeps all.
        seed: Makes the draws reproducible; None seeds from the operating system.

    Raises:
        ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be at least 0 and finite")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: must be in [0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be at least 0")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < _GREEDY_TEMPERATURE


class Sampler:
    """One sequence's draws: the processors in the order of ``generate``, and a generator."""

    def __init__(self, params: SamplingParams, *, device: torch.device) -> None:
        self._greedy = params.greedy
        self._processors = LogitsProcessorList()
        if self._greedy:
            return
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        if params.temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            self._processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(params.top_p))

    def __call__(self, ids_1T: Tensor, logits_1V: Tensor) -> Tensor:
        """Draw the token after ``ids_1T`` (int64 [1, T]) from logits of any float type: [1, 1]."""
        scores_1V = self._processors(ids_1T, logits_1V.float())
        if self._greedy:
            return torch.argmax(scores_1V, dim=-1, keepdim=True)
        probs_1V = torch.softmax(scores_1V, dim=-1)
        return torch.multinomial(probs_1V, num_samples=1, generator=self._generator)
