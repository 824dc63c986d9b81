"""Who says what the next layers will need: the thin interface between forecasts and prefetches.

A `Source` is asked inside a captured step, on a side stream, so the rules of
`runtime.policies.base` hold for it: fixed shapes, no waiting, nothing from the host.

Knows nothing of caches, links and copies.

Shape letters: T tokens · L MoE layers · E experts per layer · D hidden.
"""

import copy
import logging
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data.routers import Routers
from predictors.base import Predictor
from predictors.next_layers import NextLayers

logger = logging.getLogger(__name__)


class Now(NamedTuple):
    """How far a forward pass is.

    Attributes:
        layer: The layer whose experts compute now, or just have; -1 before layer 0.
        num_tokens: T, of the pass.
        router_input_TD: What that layer's router was given; None before layer 0.
        topk_expert_ids_TK: int64, contiguous, the experts that it chose; likewise.
    """

    layer: int
    num_tokens: int
    router_input_TD: Tensor | None = None
    topk_expert_ids_TK: Tensor | None = None


class Source(Protocol):
    """Says how likely layers that are still to come in this pass need each expert."""

    def next_HE(self, layers: range, now: Now) -> Tensor | None:
        """Probability that any of the pass's tokens needs each expert: float32 [H, E], in [0, 1].

        Args:
            layers: H of them in a row, after ``now.layer``.
            now: Where the pass is.

        Returns:
            Zeros of layers of which nothing can be said, None where that are all of them; which is
            decided by the arguments' shapes and numbers alone, as a graph replays the decision.
        """
        ...


class TokenForecast:
    """What a predictor said of the token before it began, such as `GraphPredictor.next_LE`.

    Where it has learned what a token's layers say of those behind them (`predictors.next_layers`),
    they tell more, the more of them have routed.

    Args:
        next_LE: float32, calibrated probabilities that a token uses each expert. Read when asked,
            and updated in place by whoever owns it. They are means over the rows of a batch, which
            are taken to be independent: any of T tokens needs an expert with 1 - (1 - p)^T.
        known_from: The first `Now.layer` at which they are of the token at hand: 0 where whoever
            owns them hears of a pass when layer 0 has routed.

    Attributes:
        next_LE: As given.
        next_layers: A copy of what the predictor has learned of that (`follow`), or None. It keeps
            what a pass's layers have said, so that it is for one source.
        is_silent: Whether it says nothing (`silence`).
    """

    def __init__(self, next_LE: Tensor, *, known_from: int = -1) -> None:
        self.next_LE, self._known_from = next_LE, known_from
        self.next_layers: NextLayers | None = None
        self.is_silent = False

    def follow(self, predictor: Predictor) -> None:
        """Go by what ``predictor`` has learned of next layers; its forecasts are written by others.

        Captured steps are out of date after that.
        """
        learned = copy.deepcopy(predictor.next_layers)
        if learned is None:
            logger.info(
                "Predictor %s has learned nothing of next layers: prefetches go by what it "
                "expects of a token as a whole",
                predictor.kind,
            )
        self.next_layers = None if learned is None else learned.to(self.next_LE.device)
        self.is_silent = False

    def silence(self) -> None:
        """Say nothing more until `follow`; captured steps are out of date after that.

        What was learned stays where it is: a step at hand may still be replayed once.
        """
        self.is_silent = True

    def next_HE(self, layers: range, now: Now) -> Tensor | None:
        """As `Source.next_HE`, for every layer."""
        if self.is_silent or now.layer < self._known_from:
            return None
        ids_TK = now.topk_expert_ids_TK
        if self.next_layers is not None and ids_TK is not None:
            return self.next_layers.look_ahead(now.layer, ids_TK, self.next_LE, len(layers))
        next_HE = self.next_LE[layers.start : layers.stop]
        return next_HE if now.num_tokens == 1 else any_of(next_HE, now.num_tokens)


class NextRouters:
    """The routers of the next layers, run on this layer's router input.

    `predictors.router_reuse` on the device, for layers within a pass. Source: MoEpic §3.2. What it
    says are no probabilities of use, but what is nearest to them without calibration, as there:
    K times the router's probability, at most 1. An expert that any token needs is needed.

    `runtime.engine.attach` goes by the served predictor's forecasts, so nothing is served with it:
    it is for who builds a `GpuExperts` with ``prefetch_by``. It needs no fit; tests see by it that
    a whole model which is fetched for says the same.

    Args:
        routers: Of the model that is served.
        top_k: K.
        lookahead: How many layers ahead it speaks, at least 1.
    """

    def __init__(self, routers: Routers, *, top_k: int, lookahead: int = 1) -> None:
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead}: must be at least 1")
        self._routers, self._top_k, self._lookahead = routers, top_k, lookahead

    def next_HE(self, layers: range, now: Now) -> Tensor | None:
        """As `Source.next_HE`; nothing before layer 0, or too far ahead."""
        known = range(layers.start, min(layers.stop, now.layer + 1 + self._lookahead))
        if now.router_input_TD is None or not known:
            return None
        said = []
        for layer in known:
            probs_TE = self._routers.scores_TE(layer, now.router_input_TD).softmax(-1)
            said.append(1 - (1 - (self._top_k * probs_TE).clamp_(max=1)).prod(0))
        unknown = [torch.zeros_like(said[0])] * (len(layers) - len(known))
        return torch.stack(said + unknown)


def any_of(next_HE: Tensor, num_tokens: int) -> Tensor:
    """The probability of use by any of so many independent tokens."""
    return 1 - (1 - next_HE) ** num_tokens
