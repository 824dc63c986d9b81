"""The forecaster as a fixed-shape program: what `Forecaster` says, inside a captured CUDA graph.

`token_history` explains what is read and `forecaster_net` what is made of it. Here the same numbers
lie in buffers of fixed size that are updated in place: the window of tokens that copies look back
over is always `COPY_WINDOW` long, filled from the right, and its empty places match nothing.

A window takes 4 x W x L x E bytes a row: 3 MiB for gpt-oss-20b, 24 MiB for Qwen3-30B-A3B.

Shape letters: B rows of a batch · L MoE layers · E experts per layer · K experts per token ·
T tokens of a prompt · R rows of a history · W tokens in the window · M copies · J = L * E ·
G discounts · Q carried.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.calibrate import Calibration, interpolate
from predictors.forecaster_net import ForecasterNet
from predictors.graph import GraphPredictor
from predictors.token_history import (
    COPY_MAX_MATCH,
    COPY_MIN_MATCH,
    COPY_WINDOW,
    DECAYS,
    NUM_PAST,
    NUM_TOKENS_READ,
    as_rows,
    copy_follow_PW,
    copy_weights,
    first_past_RLE,
    top_k_map,
)

_EMPTY = -2  # id in an empty place of the window: unlike -1, it is never looked for
_NEVER = 1 << 62  # behind all ids, so that a search always ends at a place


@dataclass(slots=True)
class _Said:
    """One net's buffers: what it said before the token at hand, and what layers pass on.

    Attributes:
        later_BLGE: Log odds of *later* if the token does not use an expert.
        used_BLGE: What is added to them if it does.
        carry_BQ: What layer 0 is given.
        carried_BQ: What the next layer is given.
    """

    later_BLGE: Tensor
    used_BLGE: Tensor
    carry_BQ: Tensor
    carried_BQ: Tensor


class ForecasterGraph(GraphPredictor):
    """See the module's docstring; `Forecaster.graph_module` makes it.

    Args:
        nets: Fitted, in evaluation mode; their probabilities are averaged.
        popularity_LE: float32, where a request's averages start.
        token_ids_V: int64, ascending: the tokens that have an embedding, in the order of its rows.
        discounts: g of the targets.
        calibration: Of *next*.
        top_k: K.
        batch_size: B.
    """

    past_RBLE: Tensor
    copies_MBLE: Tensor
    ids_BW: Tensor
    match_BW: Tensor
    uses_BWJ: Tensor
    tokens_B3: Tensor
    routed_LBI: Tensor
    first_past_RLE: Tensor
    decays_D: Tensor
    share_1N: Tensor
    follow_WW: Tensor
    places_W: Tensor
    token_ids_V: Tensor
    said_N: Tensor
    true_N: Tensor

    def __init__(
        self,
        *,
        nets: Sequence[ForecasterNet],
        popularity_LE: Tensor,
        token_ids_V: Tensor,
        discounts: Sequence[float],
        calibration: Calibration,
        top_k: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        B, (L, E), W = batch_size, popularity_LE.shape, COPY_WINDOW
        self.nets = nn.ModuleList(nets)
        self._top_k, self._num_known = top_k, len(token_ids_V)

        def buffer(name: str, value: Tensor) -> None:
            self.register_buffer(name, value.clone(), persistent=False)

        buffer("next_LE", torch.zeros(L, E))
        buffer("forecast_LE", torch.zeros(L, E))
        buffer("past_RBLE", torch.zeros(NUM_PAST, B, L, E))
        buffer("copies_MBLE", torch.zeros(len(COPY_MIN_MATCH), B, L, E))
        buffer("ids_BW", torch.zeros(B, W, dtype=torch.int64))
        buffer("match_BW", torch.zeros(B, W, dtype=torch.int64))
        buffer("uses_BWJ", torch.zeros(B, W, L * E))
        buffer("routed_LBI", torch.zeros(L, B, 2 * E))  # the token at hand: its map, and its use
        buffer("tokens_B3", torch.zeros(B, NUM_TOKENS_READ, dtype=torch.int64))
        for n, net in enumerate(nets):
            buffer(f"later_{n}_BLGE", torch.zeros(B, L, len(discounts), E))
            buffer(f"used_{n}_BLGE", torch.zeros(B, L, len(discounts), E))
            buffer(f"carry_{n}_BQ", torch.zeros(B, net.carry.out_features))
            buffer(f"carried_{n}_BQ", torch.zeros(B, net.carry.out_features))
            # What a use adds through its own row and the averages, whatever the past.
            own_RLGE, rates_D = net.own_later_RLGE.detach(), 1 - torch.tensor(DECAYS)
            averages_LGE = torch.einsum("d,dlge->lge", rates_D, own_RLGE[2 : NUM_PAST - 1])
            buffer(f"gain_{n}_LGE", own_RLGE[1] + averages_LGE)
        # Constants are buffers, too: made inside a graph they would be copies from the host.
        buffer("first_past_RLE", first_past_RLE(popularity_LE))
        buffer("decays_D", torch.tensor(DECAYS))
        each_G = torch.tensor(discounts) / (len(discounts) * len(nets) * B)
        buffer("share_1N", each_G.repeat(B)[None])  # of each discount's answer in the mean
        buffer("follow_WW", copy_follow_PW(torch.arange(W), W))
        buffer("places_W", torch.arange(W))
        buffer("token_ids_V", torch.cat([token_ids_V, token_ids_V.new_tensor([_NEVER])]))
        buffer("said_N", calibration.said_N)
        buffer("true_N", calibration.true_N)

    @torch.no_grad()
    def begin(self) -> None:
        """New requests in all rows."""
        self.past_RBLE.copy_(self.first_past_RLE[:, None].expand_as(self.past_RBLE))
        for name in ("copies_MBLE", "match_BW", "uses_BWJ"):
            self.get_buffer(name).zero_()
        self.ids_BW.fill_(_EMPTY)
        self.tokens_B3.fill_(self._num_known)
        self._say()

    @torch.no_grad()
    def on_token(
        self, expert_map_BLE: Tensor, token_ids_B: Tensor, next_token_ids_B: Tensor
    ) -> None:
        """Add a token of each row to its past and look ahead again."""
        map_BLE, use_BLE = top_k_map(expert_map_BLE, self._top_k)
        self.past_RBLE.copy_(self._routed(self.past_RBLE, map_BLE, use_BLE))
        for window, newest in ((self.ids_BW, token_ids_B), (self.uses_BWJ, use_BLE.flatten(1))):
            window.copy_(window.roll(-1, 1))
            window[:, -1] = newest
        # A place moves left as its predecessor was: match_BW needs no roll.
        same_BW = self.ids_BW == self._sought(next_token_ids_B)[:, None]
        self.match_BW.add_(1).masked_fill_(~same_BW, 0)
        self._copy()
        self._see(next_token_ids_B, token_ids_B, self.tokens_B3[:, 1])
        self._say()

    @torch.no_grad()
    def on_prompt(
        self, expert_map_BTLE: Tensor, token_ids_BT: Tensor, next_token_ids_B: Tensor
    ) -> None:
        """As `on_token` for each token of a prompt of at least one, right after `begin`.

        Args:
            expert_map_BTLE: float32; of a long prompt, the last `COPY_WINDOW` tokens are enough.
            token_ids_BT: int64, -1 = not known.
            next_token_ids_B: int64, the ids that are fed after the prompt.
        """
        T, W = min(expert_map_BTLE.shape[1], COPY_WINDOW), COPY_WINDOW
        map_BTLE, use_BTLE = top_k_map(expert_map_BTLE[:, -T:], self._top_k)
        ids_BT = token_ids_BT[:, -T:]
        since_T = torch.arange(T - 1, -1, -1, device=use_BTLE.device)
        for d, decay in enumerate(DECAYS):
            weight_T = (1 - decay) * decay ** since_T.float()
            self.past_RBLE[2 + d].mul_(decay**T).add_(
                torch.einsum("t,btle->ble", weight_T, use_BTLE)
            )
        age_BTLE = torch.where(use_BTLE > 0, since_T[:, None, None].float(), torch.inf)
        self.past_RBLE[-1] = torch.minimum(self.past_RBLE[-1] + T, age_BTLE.amin(1))
        self.past_RBLE[0], self.past_RBLE[1] = map_BTLE[:, -1], use_BTLE[:, -1]
        self.ids_BW[:, W - T :] = ids_BT
        self.uses_BWJ[:, W - T :] = use_BTLE.flatten(2)
        # How many tokens up to each place agree with the last ones, the next one counted first.
        sought_BN = torch.cat([self.ids_BW, self._sought(next_token_ids_B)[:, None]], 1).flip(1)
        same_BW = torch.ones_like(self.ids_BW, dtype=torch.bool)
        self.match_BW.zero_()
        for back in range(min(COPY_MAX_MATCH, T + 1)):
            sought_B1 = sought_BN[:, back, None]
            # A token without an id matches nothing, not even another one.
            agrees_BW = (self.ids_BW.roll(back, 1) == sought_B1) & (sought_B1 >= 0)
            same_BW = same_BW & agrees_BW & (self.places_W >= back)
            self.match_BW.add_(same_BW)
        self._copy()
        before_last_B = ids_BT[:, -2] if T > 1 else torch.full_like(next_token_ids_B, _EMPTY)
        self._see(next_token_ids_B, ids_BT[:, -1], self._rows(before_last_B))
        self._say()

    @torch.no_grad()
    def on_routed(self, layer: int, topk_expert_ids_BK: Tensor, topk_probs_BK: Tensor) -> Tensor:
        """What the layer's experts are worth after this token; `ForecasterNet.after_layer`."""
        if layer == 0:
            self.routed_LBI.zero_()
        routed_BI = self.routed_LBI[layer]
        map_BE, use_BE = routed_BI.chunk(2, 1)
        probs_BK = topk_probs_BK.float()
        map_BE.scatter_(1, topk_expert_ids_BK, probs_BK / probs_BK.sum(-1, keepdim=True))
        use_BE.scatter_(1, topk_expert_ids_BK, 1.0)
        later_E = torch.zeros_like(self.next_LE[layer])
        for n, net in enumerate(self.nets):
            assert isinstance(net, ForecasterNet)
            said = self._said(n)
            start_BQ = said.carry_BQ if layer == 0 else said.carried_BQ
            said.carried_BQ.copy_(torch.addmm(start_BQ, routed_BI, net.pass_on_LEQ[layer]))
            mixed_BJ = torch.addmm(
                routed_BI @ net.mix_later_LEE[layer], F.gelu(said.carried_BQ), net.take_LQE[layer]
            )
            log_odds_BGE = (
                mixed_BJ.view(said.later_BLGE[:, layer].shape) + said.later_BLGE[:, layer]
            )
            log_odds_BGE.addcmul_(map_BE[:, None], net.own_later_RLGE[0, layer])
            log_odds_BGE.addcmul_(use_BE[:, None], said.used_BLGE[:, layer])
            answers_NE = log_odds_BGE.sigmoid_().flatten(0, 1)
            later_E = later_E + (self.share_1N @ answers_NE)[0]
        return later_E

    def _said(self, n: int) -> _Said:
        names = ("later_{}_BLGE", "used_{}_BLGE", "carry_{}_BQ", "carried_{}_BQ")
        return _Said(*(self.get_buffer(name.format(n)) for name in names))

    def _routed(self, past: Tensor, map_: Tensor, use: Tensor) -> Tensor:
        """`token_history.next_past_RLE` for any shape behind R."""
        decays = self.decays_D.view(-1, *[1] * use.ndim)
        averages = decays * past[2:-1] + (1 - decays) * use
        age = (past[-1] + 1).masked_fill(use > 0, 0.0)
        return torch.cat([map_[None], use[None], averages, age[None]])

    def _sought(self, token_ids_B: Tensor) -> Tensor:
        """What to look for in the window: nothing, where an id is not known."""
        return token_ids_B.masked_fill(token_ids_B < 0, _NEVER)

    def _rows(self, token_ids_B: Tensor) -> Tensor:
        """The tokens' embedding rows."""
        row_B = torch.searchsorted(self.token_ids_V, token_ids_B)
        return row_B.masked_fill(self.token_ids_V[row_B] != token_ids_B, self._num_known)

    def _see(self, next_ids_B: Tensor, ids_B: Tensor, row_before_B: Tensor) -> None:
        rows = [self._rows(next_ids_B), self._rows(ids_B), row_before_B]
        self.tokens_B3.copy_(torch.stack(rows, 1))

    def _copy(self) -> None:
        """`token_history` on copies, over the whole window at once."""
        weights_MBW = copy_weights(self.match_BW)
        weights_MBW[..., -1] = 0.0  # the last place has no successor yet
        spread_MBW = weights_MBW @ self.follow_WW
        copies_BMJ = torch.bmm(spread_MBW.transpose(0, 1), self.uses_BWJ)
        copies_MBJ = copies_BMJ.transpose(0, 1) / (1 + weights_MBW.sum(-1, keepdim=True))
        self.copies_MBLE.copy_(copies_MBJ.view_as(self.copies_MBLE))

    def _say(self) -> None:
        rows_BRLE = torch.cat([as_rows(self.past_RBLE), self.copies_MBLE]).transpose(0, 1)
        next_BLE = ahead_BLE = torch.zeros_like(self.past_RBLE[0])
        # What the token at hand makes of the rows if it does not use an expert, but for its map.
        unused_RBLE = as_rows(
            self._routed(self.past_RBLE, *[torch.zeros_like(self.past_RBLE[0])] * 2)
        )
        unused_RBLE = torch.cat([unused_RBLE, self.copies_MBLE])
        for n, net in enumerate(self.nets):
            assert isinstance(net, ForecasterNet)
            before, said = net.before(rows_BRLE, self.tokens_B3), self._said(n)
            own_RLGE = net.own_later_RLGE
            unused_BLGE = torch.einsum("rble,rlge->blge", unused_RBLE[2:], own_RLGE[2:])
            said.later_BLGE.copy_(before.later_BLGE + unused_BLGE)
            age_BL1E = unused_RBLE[NUM_PAST - 1][:, :, None]
            gain_LGE = self.get_buffer(f"gain_{n}_LGE")
            said.used_BLGE.copy_(gain_LGE - age_BL1E * own_RLGE[NUM_PAST - 1])
            said.carry_BQ.copy_(before.carry_BQ)
            next_BLE = next_BLE + before.next_BLE.sigmoid() / len(self.nets)
            ahead_BLE = ahead_BLE + before.ahead_BLE.sigmoid() / len(self.nets)
        next_BLE = interpolate(next_BLE, self.said_N, self.true_N)
        self.next_LE.copy_(next_BLE.mean(0))
        self.forecast_LE.copy_(torch.maximum(next_BLE, ahead_BLE).mean(0))
