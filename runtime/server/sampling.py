"""Choosing the next token from the model's logits, with transformers' own processors.

Knows nothing of requests, text or the model. Shape letters: T tokens; V is the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Below this, logits / temperature may overflow float32; the limit of the softmax is the argmax.
_GREEDY_TEMPERATURE = 1e-5
# Rows of logits that become float32 at a time: a long prompt's would take gigabytes at once.
_ROWS_AT_ONCE = 128
_TOKENS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn, and what is told of the choice.

    Args:
        temperature: Not negative; 0 (or below 1e-5) takes the most probable token.
        top_p: In [0, 1]: the smallest set of tokens with at least this probability is kept.
        top_k: How many of the most probable tokens are kept; 0 keeps all.
        min_p: In [0, 1]: tokens below this share of the best one's probability are dropped.
        repetition_penalty: Above 0: what divides positive logits, and multiplies negative ones, of
            tokens that occur in the prompt or the answer; 1 changes nothing.
        frequency_penalty: Subtracted from a token's logit for each time that the answer has it.
        presence_penalty: Subtracted from a token's logit if the answer has it at all.
        logit_bias: What is added to the logits of some token ids.
        min_tokens: So many tokens of an answer are not an end-of-sequence token.
        seed: Makes the draws reproducible; None seeds from the operating system.
        num_logprobs: Tell the probability of the token drawn and of so many most probable ones;
            None tells nothing.

    Raises:
        ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    seed: int | None = None
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be at least 0 and finite")
        for name in ("top_p", "min_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1]")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: must be above 0 and finite"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: must be finite")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not abs(bias) < float("inf"):
                raise ValueError(
                    f"logit_bias={token_id}: {bias}: ids must be at least 0, biases finite"
                )
        for name in ("top_k", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise ValueError(f"num_logprobs={self.num_logprobs}: must be at least 0, or None")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < _GREEDY_TEMPERATURE


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable a token was to the model itself, before penalties, biases and temperature.

    As in vLLM; a distribution after them would hide what a greedy or truncated choice left out.

    Attributes:
        token_id: The token.
        logprob: The natural logarithm of its probability.
        top: The most probable tokens with theirs, the best first.
    """

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]]


def token_logprobs(
    token_ids_T: Sequence[int], logits_TV: Tensor, *, num_top: int
) -> list[TokenLogprobs]:
    """What the model thought of each token, given the logits from which it was chosen.

    Args:
        token_ids_T: The tokens.
        logits_TV: The model's logits *before* each of them, of any float type.
        num_top: How many of the most probable tokens to name.
    """
    found = []
    num_top = min(num_top, logits_TV.shape[-1])
    for start in range(0, len(token_ids_T), _ROWS_AT_ONCE):
        ids = token_ids_T[start : start + _ROWS_AT_ONCE]
        logprobs_TV = logits_TV[start : start + len(ids)].float().log_softmax(-1)
        ids_T1 = torch.tensor(ids, device=logits_TV.device)[:, None]
        own = logprobs_TV.gather(-1, ids_T1)[:, 0].tolist()
        top = logprobs_TV.topk(num_top, dim=-1)
        found += [
            TokenLogprobs(token_id, logprob, list(zip(top_ids, top_logprobs, strict=True)))
            for token_id, logprob, top_ids, top_logprobs in zip(
                ids, own, top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
    return found


def read_prompt(
    read: Callable[[Tensor], Tensor], ids_1T: Tensor, *, num_top: int
) -> tuple[Tensor, list[TokenLogprobs]]:
    """Read a prompt and tell how probable its tokens are.

    In pieces, because logits of all its tokens at once can be larger than the model: 32,000 tokens
    of a vocabulary of 150,000 are 10 GB.

    Args:
        read: Feeds the next tokens to the model, int64 [1, T], and gives the logits after each
            of them, [T, V].
        ids_1T: The prompt.
        num_top: How many of the most probable tokens to name.

    Returns:
        The logits after the last token, [1, V], and what the model thought of all but the first.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, ids_1T.shape[1], _TOKENS_AT_ONCE):
        logits_TV = read(ids_1T[:, start : start + _TOKENS_AT_ONCE])
        following = ids_1T[0, start + 1 : start + 1 + len(logits_TV)].tolist()
        found += token_logprobs(following, logits_TV, num_top=num_top)
    return logits_TV[-1:], found


class AnswerPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's frequency and presence penalties, which transformers does not have.

    Args:
        num_prompt_tokens: How many of the ids are the prompt's, which are not counted.
        frequency: See `SamplingParams`.
        presence: See `SamplingParams`.
    """

    def __init__(self, *, num_prompt_tokens: int, frequency: float, presence: float) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B, V] without the penalties of what ``input_ids`` [B, T] has answered."""
        answered = input_ids[:, self._num_prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, answered, torch.ones_like(answered, dtype=scores.dtype)
        )
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Sampler:
    """One sequence's draws: processors in the order of ``generate``, and a generator.

    Its only state is the generator's, so an engine that computes many sequences at once keeps one
    sampler for each and gives it that sequence's row.

    Args:
        params: What was asked.
        device: Where the logits will be.
        num_prompt_tokens: How many of the ids are the prompt's.
        eos_ids: The ids that `SamplingParams.min_tokens` holds back.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        device: torch.device,
        num_prompt_tokens: int = 0,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self._greedy = params.greedy
        self._num_logprobs = params.num_logprobs
        self._processors = LogitsProcessorList()
        if params.logit_bias:
            bias = {(token_id,): float(value) for token_id, value in params.logit_bias.items()}
            self._processors.append(SequenceBiasLogitsProcessor(bias))
        if params.repetition_penalty != 1.0:
            self._processors.append(
                RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            )
        if params.frequency_penalty or params.presence_penalty:
            self._processors.append(
                AnswerPenalty(
                    num_prompt_tokens=num_prompt_tokens,
                    frequency=params.frequency_penalty,
                    presence=params.presence_penalty,
                )
            )
        if params.min_tokens and eos_ids:
            self._processors.append(
                MinNewTokensLengthLogitsProcessor(
                    num_prompt_tokens, params.min_tokens, list(eos_ids), device=str(device)
                )
            )
        if self._greedy:
            return
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        if params.temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            self._processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0.0:
            self._processors.append(MinPLogitsWarper(params.min_p))

    def __call__(self, ids_1T: Tensor, logits_1V: Tensor) -> Tensor:
        """Draw the token after ``ids_1T`` (int64 [1, T]) from logits of any float type: [1, 1]."""
        scores_1V = self._processors(ids_1T, logits_1V.float())
        if self._greedy:
            return torch.argmax(scores_1V, dim=-1, keepdim=True)
        probs_1V = torch.softmax(scores_1V, dim=-1)
        return torch.multinomial(probs_1V, num_samples=1, generator=self._generator)

    def logprobs(self, token_id: int, logits_1V: Tensor) -> TokenLogprobs | None:
        """What the model thought of the token just drawn; None if nobody wants to know.

        Apart from the draw, so that who does not ask never waits for it on a GPU.
        """
        if self._num_logprobs is None:
            return None
        (found,) = token_logprobs([token_id], logits_1V, num_top=self._num_logprobs)
        return found
