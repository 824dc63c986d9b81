"""One running sequence: its tokens, how the next one is chosen, and the text that they make.

The same for every way of computing logits: a sequence may move from one to another between two
tokens, and its answer depends on its own logits, ids and seed alone.

Knows nothing of models, caches, queues or threads. Shape letters: T tokens ·
L MoE layers · K experts per token · V is the vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.observed_request import PassRow
from runtime.server.recording import Routed
from runtime.server.routing import VllmLayout
from runtime.server.sampling import Sampler, TokenLogprobs
from runtime.server.sequence import FinishReason, Generation, Piece
from runtime.server.text import TextStream


class Decoding:
    """What `Generation` is while it runs.

    Args:
        generation: The sequence.
        key: Its name among all sequences of the engine.
        tokenizer: The model's.
        eos_ids: Tokens that end a sequence.
        device: Where logits are.

    Attributes:
        ids: Prompt and generated token ids.
        prompt: The prompt's text.
        finish_reason: None until the last token.
        last_piece: What the last token showed, until somebody says it.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        key: str,
        tokenizer: Any,
        eos_ids: Collection[int],
        device: torch.device,
    ) -> None:
        request = generation.request
        self.generation = generation
        self.key = key
        self.ids = list(request.prompt_ids)
        self.prompt = request.prompt_text
        if self.prompt is None:
            self.prompt = tokenizer.decode(request.prompt_ids)
        self.finish_reason: FinishReason | None = None
        self.last_piece: Piece | None = None
        self._routed: list[tuple[Tensor, Tensor]] = []
        self._num_routed = 0
        self._eos_ids = eos_ids
        self._device = device
        self._unsaid: list[Tensor] = []
        self._sampler = Sampler(
            request.sampling,
            device=device,
            num_prompt_tokens=len(request.prompt_ids),
            eos_ids=sorted(eos_ids),
        )
        self._text = TextStream(
            tokenizer,
            stops=request.stops,
            context_ids=request.prompt_ids if request.continues_prompt else (),
            min_tokens=request.sampling.min_tokens,
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that were given."""
        return len(self.generation.request.prompt_ids)

    @property
    def needs_own_passes(self) -> bool:
        """Whether it asks for what passes over several sequences do not give.

        Those have logits of last tokens alone, and a prefix that another sequence computed is not
        routed anew.
        """
        request = self.generation.request
        return request.prompt_logprobs is not None or request.routed_experts

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the next pass, which is the prompt's, must tell how probable its tokens are."""
        is_prompt = len(self.ids) == self.num_prompt_tokens
        return is_prompt and self.generation.request.prompt_logprobs is not None

    def row(self, start: int, end: int) -> PassRow:
        """What a forward pass that computes the tokens from ``start`` to ``end`` is of."""
        prompt_ids = self.generation.request.prompt_ids
        return PassRow(self.key, self.prompt, prompt_ids, self.ids[start:end], start)

    def add_routing(self, position: int, ids_TLK: Tensor, probs_TLK: Tensor) -> None:
        """Keep what tokens from ``position`` on were routed to; those computed anew replace."""
        if position == 0:
            self._routed, self._num_routed = [], 0
        if position == self._num_routed:  # else a beginning is missing, which nobody can make up
            self._routed.append((ids_TLK, probs_TLK))
            self._unsaid.append(ids_TLK)
            self._num_routed += len(ids_TLK)

    def routed(self) -> Routed | None:
        """The sequence with its whole routing; None where some of it was not seen."""
        if self._num_routed != len(self.ids) - 1:
            return None
        ids, probs = zip(*self._routed, strict=True)
        return Routed(
            token_ids=self.ids,
            num_prompt_tokens=self.num_prompt_tokens,
            prompt=self.prompt,
            topk_expert_ids_TLK=torch.cat(ids).numpy(),
            topk_probs_TLK=torch.cat(probs).numpy(),
        )

    def push(
        self,
        logits_1V: Tensor,
        *,
        prompt_logprobs: Sequence[TokenLogprobs] | None = None,
        layout: VllmLayout | None = None,
    ) -> Piece:
        """Choose the next token, add it to `ids`, and say what it shows.

        Args:
            logits_1V: What follows the last of `ids`.
            prompt_logprobs: To be told with the token.
            layout: How to tell the routing, if the request asks for it.
        """
        request = self.generation.request
        routed_experts_TLK = None
        if layout is not None and request.routed_experts:
            routed_experts_TLK = layout(torch.cat(self._unsaid))
        self._unsaid = []
        ids_1T = torch.tensor([self.ids], dtype=torch.long, device=self._device)
        token_id = int(self._sampler(ids_1T, logits_1V))  # on a GPU the host waits here
        self.ids.append(token_id)
        shown = self._text.push(token_id)
        is_eos = token_id in self._eos_ids and not self.generation.request.ignore_eos
        num_tokens = len(self.ids) - self.num_prompt_tokens
        is_last = is_eos or num_tokens == self.generation.max_tokens
        if is_last and not self._text.stopped:
            shown += self._text.finish()
        if is_eos or self._text.stopped:
            self.finish_reason = "stop"
        elif is_last:
            self.finish_reason = "length"
        return Piece(
            self.generation.index,
            token_id,
            shown,
            self.finish_reason,
            logprobs=self._sampler.logprobs(token_id, logits_1V),
            prompt_logprobs=prompt_logprobs,
            routed_experts_TLK=routed_experts_TLK,
        )
