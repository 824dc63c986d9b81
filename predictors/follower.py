"""Follows a domain that the forecaster was not fitted on, from one finished request to the next.

Beside the fitted networks runs a rule that is the same for all experts (`predictors.shared_net`).
Each request starts from what finished requests used (`predictors.request_history`), and the rule
learns on from them. Two choices between the networks and the rule are made anew when requests have
finished, each by its own running loss over those, and hold until the next have:

- **next**: how many of the experts that a token used were not ranked among its first K;
- **keep**: log loss of the discounted next use.

Two, because the networks may know better what comes next and worse what to keep. On other text they
are too sure of themselves: that changes no ranking, so log loss must not decide on what comes next;
on what to keep it decides after one request, where a count of what each ranking would have kept
took one or two more.

Judging and learning is one lesson (`predictors.lessons`), given when a request begins after others
have finished. While a request runs beside it, what holds is what held before; a lesson that cannot
be taken is given when a later request begins, with what has been gathered by then.

Knows nothing of token ids and of how the networks came to what they say.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · R rows of a
history · J features · G discounts.
"""

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from predictors.base import Forecast
from predictors.request_history import RequestHistory
from predictors.shared_net import UNKNOWN_TOKENS, SharedNet, distances_TLE, features_of, learn
from predictors.token_history import USE_ROW

logger = logging.getLogger(__name__)

_EVEN_WEIGHT = 0.5  # requests' worth of even use that a start is mixed with
_FORGET = 0.9  # what is left of a running loss after each request
_REQUEST_TOKENS = 512  # of a request at most, its latest: 23 x L x E bytes each
_OPEN_REQUESTS = 16  # that are gathered from at a time
_LEARNED_TOKENS = 2048  # of finished requests, likewise
_TOKENS_PER_STEP = 8
_MAX_STEPS = 32  # of a lesson
_LEARNING_RATE = 3e-3
_BLOCK = 64  # tokens whose hidden units are held at once
_LEAST = 1e-4  # a probability's distance from 0 and 1 in a log loss


class Said(NamedTuple):
    """What one of the two says before tokens are routed.

    Attributes:
        next_TLE: Use by the token.
        ahead_TLE: Mean over discounts g of ``g^(d-1)``, d the distance to the next use.
    """

    next_TLE: Tensor
    ahead_TLE: Tensor


class Leads(NamedTuple):
    """Which of the two questions the rule answers in the networks' stead."""

    next: bool
    keep: bool


class _Tokens(NamedTuple):
    """Routed tokens.

    Attributes:
        features_TLEJ: float16, what was known before each.
        ahead_2TLE: float16, `Said.ahead_TLE` of the networks and of the rule.
        use_TLE: bool, what the token used.
    """

    features_TLEJ: Tensor
    ahead_2TLE: Tensor
    use_TLE: Tensor


class Follower:
    """See the module's docstring; one follower belongs to one caller's `RequestHistory`.

    Args:
        net: As fitted; a copy of it learns on.
        history: The finished requests, which the caller adds to.
        discounts: G of them.
        popularity_LE: Where the pasts that it is shown started.
        top_k: K.

    Attributes:
        leads: Whether the rule says what comes next, and whether it says what to keep; neither
            before a request is over.
    """

    def __init__(
        self,
        net: SharedNet,
        history: RequestHistory,
        *,
        discounts: Sequence[float],
        popularity_LE: Tensor,
        top_k: int,
    ) -> None:
        with torch.inference_mode(False):  # a replay may run in it, but this copy is to learn
            self._net = copy.deepcopy(net)  # learns
            parameters = [parameter.requires_grad_(True) for parameter in self._net.parameters()]
            self._asked_net = copy.deepcopy(net)  # says, as it was after the last lesson
        self._optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
        self._generator = torch.Generator().manual_seed(0)
        self._history, self._num_seen = history, history.num_finished
        self._is_due = False
        self._discounts, self.popularity_LE, self.top_k = discounts, popularity_LE, top_k
        self._open: list[Followed] = []
        self._learned: list[_Tokens] = []
        self._next_2, self._keep_2 = torch.zeros(2), torch.zeros(2)  # the networks', the rule's
        self.leads = Leads(next=False, keep=False)

    def begin(self) -> "Followed":
        """A request begins; what had been routed when the last ones finished is learned from."""
        if self._history.num_finished > self._num_seen:
            self._num_seen, self._is_due = self._history.num_finished, True
        if self._is_due and self._history.lessons.take_one():
            self._is_due = False
            self._give_lesson()
        known = self._history.before(self._num_seen, self._history.capacity)
        return Followed(self, start_of(known, self.popularity_LE.shape, self.top_k))

    def open(self, followed: "Followed") -> None:
        """A request has something to learn from; of too many, the earliest has had its time.

        Requests that were broken off are among them, since nobody says so.
        """
        self._open.append(followed)
        if len(self._open) > _OPEN_REQUESTS:
            self._open.pop(0).clear()

    def rule(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Use by the next token, [..., E], and ``g^(d-1)``, [..., G, E], from [..., E, J]."""
        said = torch.cat(
            [self._asked_net(part).sigmoid() for part in torch.split(features, _BLOCK)]
        )
        return said[..., 0], said[..., 1:].transpose(-1, -2)

    def warn_of_graph(self) -> None:
        """Say that a graph holds the networks alone, and what they are not leading in now."""
        logger.warning(
            "inside a graph the forecaster says what its fitted networks say; on the host, the "
            "rule that follows finished requests now says what comes next: %s; what to keep: %s",
            *("yes" if leads else "no" for leads in self.leads),
        )

    def _give_lesson(self) -> None:
        """All that has been gathered is handed over: whoever goes on gathers anew."""
        shown = [(followed.gathered, followed.misses_2) for followed in self._open]
        for followed in self._open:
            followed.clear()
        self._open.clear()
        if shown:
            self._history.lessons.give(lambda: self._take_in(shown))

    @torch.inference_mode(False)
    def _take_in(self, shown: Sequence[tuple[Sequence[_Tokens], Tensor]]) -> None:
        """Judge both and learn.

        Args:
            shown: `Followed.gathered` and `Followed.misses_2` of each request.
        """
        num_new = 0
        for gathered, misses_2 in shown:
            tokens = _joined(gathered)
            self._next_2 = _FORGET * self._next_2 + misses_2
            self._keep_2 = _FORGET * self._keep_2 + self._keep_losses_2(tokens)
            num_new += len(tokens.use_TLE)
            self._learned.append(tokens)
        _drop_first(self._learned, _LEARNED_TOKENS)
        leads = Leads(
            self._choose("what comes next", self.leads.next, self._next_2),
            self._choose("what to keep", self.leads.keep, self._keep_2),
        )
        learned = _joined(self._learned)
        learn(
            self._net,
            self._optimizer,
            learned.features_TLEJ,
            learned.use_TLE,
            discounts=self._discounts,
            num_steps=min(_MAX_STEPS, max(2, num_new // _TOKENS_PER_STEP)),
            generator=self._generator,
        )
        # Requests that run beside this are told by the one or the other, never by half a step.
        self._asked_net = copy.deepcopy(self._net)
        self.leads = leads

    def _keep_losses_2(self, tokens: _Tokens) -> Tensor:
        """Log loss of `Said.ahead_TLE`, both sides', over the tokens whose next use is known."""
        distance_TLE1 = distances_TLE(tokens.use_TLE)[..., None]
        truth_TLE = (torch.tensor(self._discounts) ** (distance_TLE1 - 1)).mean(-1)
        stop = max(1, len(truth_TLE) - UNKNOWN_TOKENS)
        losses = [
            F.binary_cross_entropy(
                ahead_TLE[:stop].float().clamp(_LEAST, 1 - _LEAST),
                truth_TLE[:stop],
                reduction="sum",
            )
            for ahead_TLE in tokens.ahead_2TLE
        ]
        return torch.stack(losses)

    def _choose(self, what: str, before: bool, losses_2: Tensor) -> bool:
        networks, rule = losses_2.tolist()
        leads = bool(rule < networks)
        if leads is not before:
            logger.info(
                "%s is now said by %s: running loss over finished requests %.5g, not %.5g",
                what,
                "the rule that follows them" if leads else "the fitted networks",
                min(networks, rule),
                max(networks, rule),
            )
        return leads


class Followed:
    """What one request has shown so far; the caller's, as all of a request's past is.

    `say` comes before each token, or before several in a row whose past is known by then; `add`
    comes once they have been routed.

    Args:
        follower: Whose request it is.
        start_LE: What it starts from.

    Attributes:
        rule_keeps: The rule says what to keep of the tokens at hand.
        gathered: Routed tokens that were not learned from yet; the earliest are dropped.
        misses_2: Of the experts used since, how many the networks and the rule had not foreseen.
    """

    def __init__(self, follower: "Follower", start_LE: Tensor) -> None:
        self._follower, self._start_LE = follower, start_LE
        self._num_tokens = 0
        self._said: tuple[Tensor, Said, Said] | None = None  # features, the networks, the rule
        self.rule_keeps = False
        self.clear()

    def clear(self) -> None:
        """What was gathered has been learned from."""
        self.gathered: list[_Tokens] = []
        self.misses_2 = torch.zeros(2)

    @torch.no_grad()
    def say(self, rows_TRLE: Tensor, own: Said) -> Forecast:
        """What is expected before each of the next tokens: float32 [T, L, E].

        Args:
            rows_TRLE: float32, the past before each token.
            own: What the networks say.
        """
        features_TLEJ = self._features(rows_TRLE, None, ahead=0)
        next_TLE, later_TLGE = self._follower.rule(features_TLEJ)
        rule, leads = Said(next_TLE, later_TLGE.mean(-2)), self._follower.leads
        self._said, self.rule_keeps = (features_TLEJ, own, rule), leads.keep
        next_TLE = (rule if leads.next else own).next_TLE
        keeper = rule if leads.keep else own
        forecast_TLE = torch.maximum(*keeper)
        if leads.next is not leads.keep:  # their difference is what says what to keep
            forecast_TLE = next_TLE + (forecast_TLE - keeper.next_TLE)
        return Forecast(next_TLE, forecast_TLE)

    @torch.no_grad()
    def later(self, rows: Tensor, layer: int | None = None) -> Tensor:
        """The rule's ``g^(d-1)``, d counted from the token after one that has been routed.

        Args:
            rows: float32 [R, E], the layer's rows with the token at hand added; without a layer
                [T, R, L, E], of each of the next tokens.
            layer: Or None for all.

        Returns:
            float32 [G, E], or [T, L, G, E].
        """
        return self._follower.rule(self._features(rows, layer, ahead=1))[1]

    @torch.no_grad()
    def add(self, rows_TRLE: Tensor) -> None:
        """The first T of the tokens that `say` was last asked of have been routed.

        Args:
            rows_TRLE: float32, the past after each.
        """
        assert self._said is not None, "say comes before add"
        use_TLE = rows_TRLE[:, USE_ROW]
        num_tokens = len(use_TLE)
        if not num_tokens:
            return
        features_TLEJ, *both = self._said
        ahead_2TLE = torch.stack([said.ahead_TLE[:num_tokens] for said in both])
        top_k = self._follower.top_k
        self.misses_2 += torch.stack(
            [_misses(said.next_TLE[:num_tokens], use_TLE, top_k) for said in both]
        )
        self._num_tokens += num_tokens
        if not self.gathered:
            self._follower.open(self)
        latest = slice(max(0, num_tokens - _REQUEST_TOKENS), num_tokens)
        self.gathered.append(
            _Tokens(features_TLEJ[latest].half(), ahead_2TLE[:, latest].half(), use_TLE[latest] > 0)
        )
        _drop_first(self.gathered, _REQUEST_TOKENS)

    def skip(self, num_tokens: int) -> None:
        """Tokens have been routed of which nothing had been said."""
        self._num_tokens += num_tokens

    def _features(self, rows: Tensor, layer: int | None, *, ahead: int) -> Tensor:
        num_tokens = torch.tensor(self._num_tokens + ahead)
        start, popularity = self._start_LE, self._follower.popularity_LE
        if layer is None:
            num_tokens = (num_tokens + torch.arange(len(rows)))[:, None, None]
        else:
            start, popularity = start[layer], popularity[layer]
        return features_of(rows, shift=start - popularity, start=start, num_tokens=num_tokens)


def start_of(known: Sequence[Tensor], shape_LE: Sequence[int], top_k: int) -> Tensor:
    """Where a request starts: mean use of the finished ones, mixed with even use; float32 [L, E].

    Args:
        known: float32 [L, E] each, as `RequestHistory` has them.
        shape_LE: L and E.
        top_k: K.
    """
    total_LE = torch.full(tuple(shape_LE), _EVEN_WEIGHT * top_k / shape_LE[1])
    for use_LE in known:
        total_LE += use_LE
    return total_LE / (len(known) + _EVEN_WEIGHT)


def _misses(said_TLE: Tensor, use_TLE: Tensor, top_k: int) -> Tensor:
    """How many used experts are not among the K that stand first in their layer."""
    first_TLK = said_TLE.topk(top_k, dim=-1).indices
    return use_TLE.sum() - use_TLE.gather(-1, first_TLK).sum()


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    """Copies, so that nothing that was made in a replay stays an inference tensor."""
    features, ahead, use = zip(*parts, strict=True)
    return _Tokens(torch.cat(features), torch.cat(ahead, dim=1), torch.cat(use))


def _drop_first(parts: list[_Tokens], num_kept: int) -> None:
    """Drop the first parts, as long as the others hold so many tokens."""
    while sum(len(part.use_TLE) for part in parts[1:]) >= num_kept:
        del parts[0]
