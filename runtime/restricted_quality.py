"""How far a model's answers are from its own where its routers are restricted.

Against the same model with all of its experts, request by request:

- agreement: share of the full model's greedy answer's tokens that the restricted model would have
  said too, given the full model's tokens before (teacher-forced);
- KL: of the restricted model's next-token distribution from the full one's, nats, mean over the
  answer's positions;
- perplexity of the prompts' own text.

eMoE takes the similarity of two texts by a sentence encoder instead, which hides what a wrong token
does, and which depends on where the texts part.

Knows nothing of how a model is restricted. Shape letters: T tokens · L MoE layers · E experts per
layer · V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.observe import RouterRecorder
from data.schema import MoESpec


class Full(NamedTuple):
    """What the full model says of a judged request.

    Attributes:
        ids_T: The prompt and the greedy answer, all of which is read but the last.
        start: The prompt's length.
        logprobs_TV: float32, of the token after each that is read.
        use_LE: float32, share of the read tokens that used each expert.
    """

    ids_T: Tensor
    start: int
    logprobs_TV: Tensor
    use_LE: Tensor


class Quality(NamedTuple):
    """Of one request under restricted routing.

    Attributes:
        agreement: Share of the answer's tokens.
        kl_nats: Mean of its positions.
        text_nats: Summed over the prompt's tokens but the first.
        num_text: How many those are.
    """

    agreement: float
    kl_nats: float
    text_nats: float
    num_text: int


def use_of(ids_TLK: Tensor, spec: MoESpec) -> Tensor:
    """float32 [L, E], the share of the tokens that used each expert."""
    return F.one_hot(ids_TLK.long(), spec.num_experts).sum(dim=2).float().mean(dim=0)


@torch.inference_mode()
def logprobs_of(model: Any, ids_T: Tensor) -> Tensor:
    """float32 [T, V], of the token after each."""
    logprobs_TV: Tensor = model(ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)
    return logprobs_TV


@torch.inference_mode()
def answered(model: Any, prompt_ids_T: Tensor, num_tokens: int) -> Tensor:
    """A prompt and its greedy answer of exactly so many tokens."""
    ids_1T: Tensor = model.generate(
        prompt_ids_T[None],
        attention_mask=torch.ones_like(prompt_ids_T)[None],
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return ids_1T[0]


def say_all(model: Any, prompts: Sequence[Tensor], spec: MoESpec, num_tokens: int) -> list[Full]:
    """What the full model says of each request."""
    said = []
    for prompt_ids_T in prompts:
        ids_T = answered(model, prompt_ids_T, num_tokens)
        with RouterRecorder(model, keep_router_probs=False) as tap:
            logprobs_TV = logprobs_of(model, ids_T[:-1])
            use_LE = use_of(tap.take().ids_NLK, spec)
        said.append(Full(ids_T, len(prompt_ids_T), logprobs_TV, use_LE))
    return said


def judge(model: Any, full: Full) -> Quality:
    """How a restricted model does on a request."""
    logprobs_TV = logprobs_of(model, full.ids_T[:-1])
    return compare(full, logprobs_TV)


def compare(full: Full, logprobs_TV: Tensor) -> Quality:
    """Quality of what another model says at the same positions, float32 [T, V]."""
    answer = slice(full.start - 1, None)  # the prompt's last token says the answer's first
    own_TV, other_TV = full.logprobs_TV[answer], logprobs_TV[answer]
    kl_T = (own_TV.exp() * (own_TV - other_TV)).sum(dim=-1)
    text_T = full.ids_T[1 : full.start]
    nats_T = -logprobs_TV[: full.start - 1].gather(-1, text_T[:, None])
    return Quality(
        agreement=float((own_TV.argmax(-1) == other_TV.argmax(-1)).float().mean()),
        kl_nats=float(kl_T.mean()),
        text_nats=float(nats_T.sum()),
        num_text=len(text_T),
    )


def summed_up(found: Sequence[Quality]) -> dict[str, float]:
    """Means over requests, with the standard error of the agreement's."""
    agreements = [one.agreement for one in found]
    error = np.std(agreements, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    nats = sum(one.text_nats for one in found) / sum(one.num_text for one in found)
    return {
        "agreement": float(np.mean(agreements)),
        "agreement_se": float(error),
        "kl_nats": float(np.mean([one.kl_nats for one in found])),
        "perplexity": math.exp(nats),
    }
