"""A request's past as numbers: what the forecaster reads of everything that has been routed so far.

Before each token there are `NUM_ROWS` numbers for every (layer, expert), in rows:

    0     the last token's expert map, reduced to its K largest and renormalised, since traces of
          other engines record no more than that
    1     1 for those K experts. They are the ones that ran, but for routers whose choice is steered
          by biases or groups: a map is all that `Predictor.on_token` is shown
    2-5   moving averages of use, one for each of `DECAYS`; they start at popularity
    6     `_AGE_SCALE` * log(1 + tokens since the last use)
    7-8   copies: the use that followed earlier places of this request which ended in the same
          tokens as it does now, at least one and at least two of them
    9-10  echoes: the use that followed earlier places of this request which were routed as the last
          token was, from there on and of the very next token

Rows 0 to 6 are the *past*, and change when a token is routed. Rows 7 to 10 are the *copies*, and
change when the next token is about to be routed; without its id 7 and 8 are 0. Text repeats itself,
and a phrase that comes back routes much as it did: with t the place at hand and j < t a place whose
last ``n`` tokens are the same, the copy is

    sum over j, i of w_j * (1 - g) * g^(i-j-1) * use_i / (1 + sum of w_j),   j < i < t,

with w_j = `_COPY_BASE` ** min(n, `COPY_MAX_MATCH`). An echo needs no ids: with s_j the share of the
last token's experts, of all layers, that token j used too,

    w_j = exp(`ECHO_SHARPNESS` * s_j) - 1,

and exp(`ECHO_SHARPNESS` * `_ECHO_LIKE`) stands in for the 1 below. Row 9 is the sum above; row 10
is that of its terms i = j + 1 alone, without (1 - g). All this is attention with fixed weights;
nothing is learned here, and nothing looks past the token whose id is known.

`History` goes along with a request, token by token or a prompt at once, and is what serving runs;
`histories_of` computes the rows before every token of a trace at once, on any device, and says the
same. Both look back over `COPY_WINDOW` tokens for copies.

Shape letters: L MoE layers · E experts per layer · J = L * E · K experts per token · T tokens ·
N = T + 1 places before and after them · S tokens of a block · R rows · D averages · M copies ·
W tokens in the window · P of them with weight · B tokens whose copies are computed at once.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from data.errors import MoecastError
from data.schema import Trace

DECAYS: Final = (0.5, 0.8, 0.93, 0.98)
NUM_PAST: Final = 3 + len(DECAYS)
USE_ROW: Final = 1
AVERAGE_ROWS: Final = slice(2, 2 + len(DECAYS))
AGE_ROW: Final = NUM_PAST - 1
COPY_MIN_MATCH: Final = (1, 2)
NUM_COPIES: Final = len(COPY_MIN_MATCH) + 2  # and two echoes
NUM_ROWS: Final = NUM_PAST + NUM_COPIES
COPY_WINDOW: Final = 1024
COPY_MAX_MATCH: Final = 5
COPY_DISCOUNT: Final = 0.9
ECHO_SHARPNESS: Final = 20.0
NUM_TOKENS_READ: Final = 3  # the next token's id, the last one's and the one's before

_COPY_BASE: Final = 4.0
_ECHO_LIKE: Final = 0.6  # where a place counts as much as all that is not alike
_FIRST_AGE: Final = 60.0  # of an expert that this request has not used yet
_AGE_SCALE: Final = 0.25  # brings a row's values to about 1, as the others' are
_BLOCK: Final = 512  # tokens whose copies are computed at once
_SCAN: Final = 64  # tokens whose averages are one product of matrices

_DECAYS_D11 = torch.tensor(DECAYS)[:, None, None]


def top_k_map(expert_map_LE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Row 0 and row 1 of what follows a token, from its expert map (any leading dimensions)."""
    probs_LK, ids_LK = expert_map_LE.topk(top_k, dim=-1)
    probs_LK = probs_LK / probs_LK.sum(-1, keepdim=True).clamp_min(1e-9)
    zeros_LE = torch.zeros_like(expert_map_LE)
    return zeros_LE.scatter(-1, ids_LK, probs_LK), zeros_LE.scatter(-1, ids_LK, 1.0)


def first_past_RLE(popularity_LE: Tensor) -> Tensor:
    """The past of a request of which nothing has been routed: float32 [NUM_PAST, L, E]."""
    past_RLE = torch.zeros(NUM_PAST, *popularity_LE.shape)
    past_RLE[2:-1] = popularity_LE
    past_RLE[-1] = _FIRST_AGE  # as a count of tokens; `as_rows` scales it
    return past_RLE


def next_past_RLE(past_RLE: Tensor, map_LE: Tensor, use_LE: Tensor) -> Tensor:
    """The past once a token has been routed; also for one layer's [NUM_PAST, E] and [E]."""
    decays = _DECAYS_D11 if map_LE.ndim == 2 else _DECAYS_D11[..., 0]
    averages = decays * past_RLE[2:-1] + (1 - decays) * use_LE
    age = torch.where(use_LE > 0, 0.0, past_RLE[-1] + 1)
    return torch.cat([map_LE[None], use_LE[None], averages, age[None]])


def as_rows(past_RLE: Tensor) -> Tensor:
    """A past as the net reads it: ages on a logarithmic scale."""
    return torch.cat([past_RLE[:-1], as_age_row(past_RLE[-1:])])


def as_age_row(age_LE: Tensor) -> Tensor:
    """Row 6, from tokens since the last use (any shape)."""
    return _AGE_SCALE * age_LE.log1p()


class History:
    """One request's past, token by token.

    Args:
        popularity_LE: float32, what is expected before anything has been routed.
        top_k: K.
    """

    def __init__(self, popularity_LE: Tensor, top_k: int) -> None:
        self._top_k = top_k
        self._past_RLE = first_past_RLE(popularity_LE)
        self._copies_RLE = torch.zeros(NUM_COPIES, *popularity_LE.shape)
        self._uses_WJ = torch.zeros(0, popularity_LE.numel(), dtype=torch.bool)
        self._ids_W = torch.zeros(0, dtype=torch.int64)
        self._match_W = torch.zeros(0, dtype=torch.int64)

    @property
    def rows_RLE(self) -> Tensor:
        """What is known before the next token is routed: float32 [NUM_ROWS, L, E]."""
        return torch.cat([as_rows(self._past_RLE), self._copies_RLE])

    def after_RE(self, layer: int, router_probs_E: Tensor) -> Tensor:
        """One layer's rows once it has routed the token at hand; the history stays as it is."""
        map_E, use_E = top_k_map(router_probs_E, self._top_k)
        past_RE = next_past_RLE(self._past_RLE[:, layer], map_E, use_E)
        return torch.cat([as_rows(past_RE), self._copies_RLE[:, layer]])

    def add(
        self, expert_map_LE: Tensor, *, token_id: int | None, next_token_id: int | None
    ) -> None:
        """A token has passed all layers; which one comes next may be known."""
        self.add_all(expert_map_LE[None], token_ids_T=[token_id], next_token_ids_T=[next_token_id])

    def add_all(
        self,
        expert_maps_TLE: Tensor,
        *,
        token_ids_T: Sequence[int | None],
        next_token_ids_T: Sequence[int | None],
    ) -> None:
        """Tokens, at least one, have passed all layers: `add` of each in turn, at once."""
        map_TLE, use_TLE = top_k_map(expert_maps_TLE, self._top_k)
        self._past_RLE = _past_after_RLE(self._past_RLE, map_TLE[-1], use_TLE)
        # A token without an id matches nothing, not even another one.
        ids_T = torch.tensor([-1 if token is None else token for token in token_ids_T])
        ids_W = torch.cat([self._ids_W, ids_T])
        uses_WJ = torch.cat([self._uses_WJ, use_TLE.flatten(1) > 0])
        match_W = self._match_W
        if len(token_ids_T) >= COPY_MAX_MATCH:  # a longer match counts no more than one of so many
            match_W = torch.zeros(len(ids_W) - COPY_MAX_MATCH, dtype=torch.int64)
        for sought in next_token_ids_T[-COPY_MAX_MATCH:]:
            before_W = torch.cat([torch.zeros(1, dtype=torch.int64), match_W])  # places move on
            if sought is None:
                match_W = torch.zeros_like(before_W)
            else:
                match_W = torch.where(ids_W[: len(before_W)] == sought, before_W + 1, 0)
        self._ids_W, self._match_W = ids_W[-COPY_WINDOW:], match_W[-COPY_WINDOW:]
        self._uses_WJ = uses_WJ[-COPY_WINDOW:]
        all_1W = torch.ones(1, len(self._ids_W), dtype=torch.bool)
        copies_M1J = _copies_MBJ(self._match_W[None], self._uses_WJ[-1:], self._uses_WJ, all_1W)
        self._copies_RLE = copies_M1J.view_as(self._copies_RLE)


def _past_after_RLE(past_RLE: Tensor, map_LE: Tensor, use_TLE: Tensor) -> Tensor:
    """`next_past_RLE` of T tokens, of which the last one's map is given."""
    num_tokens = len(use_TLE)
    since_T = torch.arange(num_tokens - 1, -1, -1.0)
    decays_D1 = _DECAYS_D11[:, 0]
    weights_DT = (1 - decays_D1) * decays_D1**since_T
    averages = (weights_DT @ use_TLE.flatten(1)).view(-1, *use_TLE.shape[1:])
    averages += _DECAYS_D11**num_tokens * past_RLE[2:-1]
    age_TLE = torch.where(use_TLE > 0, since_T[:, None, None], torch.inf)
    age_LE = torch.minimum(past_RLE[-1] + num_tokens, age_TLE.amin(0))
    return torch.cat([map_LE[None], use_TLE[-1:], averages, age_LE[None]])


def histories_of(trace: Trace, popularity_LE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """All of a trace's histories at once.

    Args:
        trace: Any; without token ids it has echoes only.
        popularity_LE: float32, on the device where to compute.
        top_k: K.

    Returns:
        The past before each row, and after the last one, as rows: float32 [T + 1, NUM_PAST, L, E];
        and the copies before each row: float32 [T, NUM_COPIES, L, E].

    Raises:
        MoecastError: A recorded probability is NaN or infinite.
    """
    device, (L, E) = popularity_LE.device, popularity_LE.shape
    maps_TLE = torch.from_numpy(trace.expert_maps_TLE(E))
    if not maps_TLE.isfinite().all():
        raise MoecastError(f"request {trace.request_id!r}: router probabilities are not finite")
    map_TLE, use_TLE = top_k_map(maps_TLE.to(device), top_k)
    past_NRLE = torch.zeros(trace.num_tokens + 1, NUM_PAST, L, E, device=device)
    past_NRLE[1:, 0], past_NRLE[1:, 1] = map_TLE, use_TLE
    past_NRLE[0, 2:-1] = popularity_LE
    _average(past_NRLE[:, 2:-1].flatten(2), use_TLE.flatten(1), DECAYS)
    # Rows are numbered from 1 for the first token, so that 0 is "not used yet".
    row_N11 = torch.arange(trace.num_tokens + 1, device=device)[:, None, None]
    last_NLE = (row_N11 * past_NRLE[:, 1].bool()).cummax(0).values
    age_NLE = torch.where(last_NLE > 0, row_N11 - last_NLE, row_N11 + _FIRST_AGE)
    past_NRLE[:, -1] = _AGE_SCALE * age_NLE.float().log1p()
    ids_T = torch.full((trace.num_tokens,), -1)
    if trace.token_ids_P is not None:
        first = trace.first_routed_position
        ids_T = torch.from_numpy(
            trace.token_ids_P[first : first + trace.num_tokens].astype(np.int64)
        )
    copies_TMJ = _all_copies_TMJ(ids_T.to(device), use_TLE.flatten(1) > 0)
    return past_NRLE, copies_TMJ.view(trace.num_tokens, NUM_COPIES, L, E)


def _average(averages_NDJ: Tensor, use_TJ: Tensor, decays: Sequence[float]) -> None:
    """Fill in the averages after each token; row 0 is given."""
    step_S = torch.arange(_SCAN, device=use_TJ.device)
    decays_D11 = torch.tensor(decays, device=use_TJ.device)[:, None, None]
    ago_SS = step_S[:, None] - step_S
    weights_DSS = (1 - decays_D11) * decays_D11 ** ago_SS.clamp(min=0) * (ago_SS >= 0)
    kept_SD1 = (decays_D11 ** (step_S + 1)[:, None]).transpose(0, 1)
    for start in range(0, len(use_TJ), _SCAN):
        part_SJ = use_TJ[start : start + _SCAN]
        n = len(part_SJ)
        within_SDJ = (weights_DSS[:, :n, :n] @ part_SJ).transpose(0, 1)
        averages_NDJ[start + 1 : start + 1 + n] = within_SDJ + kept_SD1[:n] * averages_NDJ[start]


def tokens_read_N3(trace: Trace, token_rows: dict[int, int]) -> Tensor:
    """int32 [T + 1, 3]: the embedding rows read before each token, and after the last one.

    The first token's id is not known when the first forecast is made.
    """
    unknown = len(token_rows)
    rows_N3 = np.full((trace.num_tokens + 1, NUM_TOKENS_READ), unknown, np.int32)
    if trace.token_ids_P is not None:
        first = trace.first_routed_position
        ids = trace.token_ids_P[first : first + trace.num_tokens].tolist()
        row_T = np.array([token_rows.get(token, unknown) for token in ids], np.int32)
        rows_N3[1:-1, 0] = row_T[1:]
        for back in range(1, NUM_TOKENS_READ):
            rows_N3[back:, back] = row_T[: trace.num_tokens + 1 - back]
    return torch.from_numpy(rows_N3)


def _all_copies_TMJ(ids_T: Tensor, uses_TJ: Tensor) -> Tensor:
    """Copies before every token but the first, whose id nobody tells in time."""
    num_tokens, device = len(ids_T), ids_T.device
    copies_TMJ = torch.zeros(num_tokens, NUM_COPIES, uses_TJ.shape[1], device=device)
    for start in range(1, num_tokens, _BLOCK):
        stop = min(start + _BLOCK, num_tokens)
        low = max(0, start - COPY_WINDOW)
        now_B1 = torch.arange(start, stop, device=device)[:, None]
        place_W = torch.arange(low, stop, device=device)
        routed_BW = (place_W < now_B1) & (place_W >= now_B1 - COPY_WINDOW)
        match_BW = torch.zeros(routed_BW.shape, dtype=torch.int64, device=device)
        same_BW = routed_BW & (ids_T[now_B1] >= 0)
        for back in range(COPY_MAX_MATCH):  # one more token back, as long as all after it agree
            same_BW = same_BW & (place_W >= back)
            same_BW &= ids_T[(now_B1 - back).clamp(min=0)] == ids_T[(place_W - back).clamp(min=0)]
            match_BW += same_BW
        copies_MBJ = _copies_MBJ(
            match_BW, uses_TJ[start - 1 : stop - 1], uses_TJ[low:stop], routed_BW
        )
        copies_TMJ[start:stop] = copies_MBJ.transpose(0, 1)
    return copies_TMJ


def copy_weights(match_W: Tensor) -> Tensor:
    """How much each place counts, for each of `COPY_MIN_MATCH`: float32 [M, ..., W]."""
    weight_W = _COPY_BASE ** match_W.clamp(max=COPY_MAX_MATCH).float()
    rows = [weight_W.masked_fill(match_W < least, 0.0) for least in COPY_MIN_MATCH]
    return torch.stack(rows)


def against_M1() -> Tensor:
    """What each row's weights are set against, so that little evidence says little."""
    echo = math.exp(ECHO_SHARPNESS * _ECHO_LIKE)
    return torch.tensor([1.0] * len(COPY_MIN_MATCH) + [echo] * 2)[:, None]


def copy_follow_MWW(num_places: int) -> Tensor:
    """How much each place of the window adds to the copy of what followed another: float32."""
    place_W = torch.arange(num_places)
    steps_WW = place_W - place_W[:, None] - 1
    follow_WW = (1 - COPY_DISCOUNT) * COPY_DISCOUNT ** steps_WW.clamp(min=0) * (steps_WW >= 0)
    return torch.stack([follow_WW] * (NUM_COPIES - 1) + [(steps_WW == 0).float()])


def _copies_MBJ(match_BW: Tensor, last_BJ: Tensor, uses_WJ: Tensor, routed_BW: Tensor) -> Tensor:
    """Copies and echoes: what followed the places that are alike.

    Args:
        match_BW: int64, how many tokens up to a place are the same.
        last_BJ: bool, use of the last routed token.
        uses_WJ: bool, use at each place.
        routed_BW: Places that have been routed.
    """
    uses_WJ, last_BJ = uses_WJ.float(), last_BJ.float()
    shared_BW = last_BJ @ uses_WJ.T / last_BJ.sum(1, keepdim=True)
    echo_BW = torch.expm1(ECHO_SHARPNESS * shared_BW)
    weights_MBW = torch.cat([copy_weights(match_BW), echo_BW[None]]) * routed_BW
    # The last routed place has no successor yet, so it neither adds nor counts.
    weights_MBW[..., :-1] *= routed_BW[:, 1:]
    weights_MBW[..., -1] = 0.0
    # What a place adds for those after it decays from one to the next, as an average does.
    weights_WI = weights_MBW.flatten(0, 1).T
    spread_N1I = weights_WI.new_zeros(len(weights_WI) + 1, 1, weights_WI.shape[1])
    _average(spread_N1I, weights_WI, [COPY_DISCOUNT])
    spread_MBW = spread_N1I[:-1, 0].T.view_as(weights_MBW) * routed_BW
    spread_MBW = torch.cat([spread_MBW, weights_MBW[-1:].roll(1, -1)])
    total_MB = weights_MBW[[0, 1, 2, 2]].sum(-1) + against_M1().to(match_BW.device)
    return spread_MBW @ uses_WJ / total_MB[..., None]
