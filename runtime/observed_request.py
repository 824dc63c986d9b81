"""One request as an observer sees it: what its predictor remembers, forecasts, and has yet to see.

Knows nothing of models, hooks, batches or caches. Shape letters: T tokens of a forward pass ·
L MoE layers · E experts per layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from predictors.base import Forecast, Predictor, Request


class PassRow(NamedTuple):
    """One sequence's part in the next forward pass, whose tokens lie one sequence after another.

    Attributes:
        key: Names the sequence as long as it lives.
        prompt: Its prompt's text, or None.
        prompt_ids: Its prompt's token ids.
        ids: The tokens that this pass computes.
        position: Where the first of them stands in the sequence. Above 0 in a sequence that was not
            seen before, the tokens in front of it are known from another one's computation.
    """

    key: str
    prompt: str | None
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    position: int


class ObservedRequest:
    """A request's past, from its prompt on; nothing of one is ever shown to another.

    Args:
        predictor: Who forecasts.
        request: What is known of it before anything is routed.
        top_k: K, to count what it uses; None if nobody asks.
        position: Where the first token that will be routed stands.

    Attributes:
        state: The predictor's memory of it.
        forecast: The latest, or None.
        next_position: Where the next token to be routed stands.
    """

    def __init__(
        self, predictor: Predictor, request: Request, *, top_k: int | None, position: int = 0
    ) -> None:
        self.state = predictor.new_state()
        self.next_position = position
        self._predictor = predictor
        self._unseen: tuple[Tensor, Sequence[int | None]] | None = None
        self._top_k = top_k
        self._use_LE: Tensor | None = None
        self._num_counted = 0
        self._has_decoded = False
        self.forecast: Forecast | None = predictor.on_request(self.state, request)

    def routed(self, maps_TLE: Tensor, ids_T: Sequence[int | None], *, is_prompt: bool) -> None:
        """Its next tokens have passed all layers; `show` hands them to the predictor."""
        self.next_position += len(ids_T)
        self._unseen = (maps_TLE, ids_T)
        if self._top_k is None:
            return
        if not is_prompt and not self._has_decoded:
            # The prompt counts only as long as nothing has been decoded (`request_use_LE`).
            self._has_decoded, self._use_LE, self._num_counted = True, None, 0
        used_TLK = maps_TLE.topk(self._top_k, dim=-1).indices
        use_TLE = torch.zeros_like(maps_TLE, dtype=torch.float32).scatter_(-1, used_TLK, 1.0)
        total_LE = use_TLE.sum(dim=0)
        self._use_LE = total_LE if self._use_LE is None else self._use_LE + total_LE
        self._num_counted += len(ids_T)

    def show(self, next_id: int | None) -> None:
        """Let the predictor see what was routed, now that the id which follows is known."""
        if self._unseen is None:
            return
        (maps_TLE, ids_T), self._unseen = self._unseen, None
        self.forecast = self._predictor.on_tokens(
            self.state,
            maps_TLE,
            token_ids_T=ids_T,
            next_token_ids_T=[*ids_T[1:], next_id],
        )

    def use_LE(self) -> Tensor | None:
        """Share of its tokens that used each expert; None where nothing was counted."""
        return None if self._use_LE is None else self._use_LE / self._num_counted
