"""The forecaster as a fixed-shape program: what `Forecaster` says, inside a captured CUDA graph.

`token_history` explains what is read and `forecaster_net` what is made of it. Here the same numbers
lie in buffers of fixed size that are updated in place: the window of tokens that copies look back
over is always `COPY_WINDOW` long, filled from the right, and its empty places match nothing.

A window takes 4 x W x L x E bytes a row: 3 MiB for gpt-oss-20b, 24 MiB for Qwen3-30B-A3B. It is
read twice a token and never moved: its places are slots of a ring.

Shape letters: B rows of a batch · N nets · L MoE layers · E experts per layer · K experts per
token · T tokens of a prompt · R rows of a history · D averages · W tokens in the window ·
M copies · J = L * E · G discounts · Q carried · I = 2 * E · S = N * B.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.calibrate import Calibration, interpolate, slopes
from predictors.forecaster_before import ForecasterBefore
from predictors.forecaster_net import ForecasterNet
from predictors.graph import GraphPredictor
from predictors.token_history import (
    AGE_ROW,
    AVERAGE_ROWS,
    COPY_MAX_MATCH,
    COPY_WINDOW,
    DECAYS,
    ECHO_SHARPNESS,
    NUM_PAST,
    NUM_ROWS,
    NUM_TOKENS_READ,
    against_M1,
    as_age_row,
    as_rows,
    copy_follow_MWW,
    copy_weights,
    first_past_RLE,
    top_k_map,
)

_EMPTY = -2  # id in an empty place of the window: unlike -1, it is never looked for
_NEVER = 1 << 62  # behind all ids, so that a search always ends at a place


class ForecasterGraph(GraphPredictor):
    """See the module's docstring; `Forecaster.graph_module` makes it.

    Args:
        nets: Fitted, in evaluation mode; their probabilities are averaged. Parts of them become
            this module's own.
        popularity_LE: float32, where a request's averages start.
        token_ids_V: int64, ascending: the tokens that have an embedding, in the order of its rows.
        discounts: g of the targets.
        calibration: Of *next*.
        top_k: K.
        batch_size: B.
        kernels: Answer in one launch (`predictors.kernels.later_use`); False does it in torch, in
            some sixteen.

    Raises:
        ImportError: ``kernels`` without Triton.
    """

    rows_BRLE: Tensor
    age_BLE: Tensor
    ids_BW: Tensor
    match_BW: Tensor
    uses_BWJ: Tensor
    slot_of_place_W: Tensor
    tokens_B3: Tensor
    later_LNBGE: Tensor
    used_LNBGE: Tensor
    carried_LNBQ: Tensor
    answers_SE: Tensor
    first_past_RLE: Tensor
    rates_D11: Tensor
    own_age_NLGE: Tensor
    gain_NLGE: Tensor
    share_G: Tensor
    weights_MN: Tensor
    follow_MWW: Tensor
    against_M1: Tensor
    places_W: Tensor
    token_ids_V: Tensor
    said_N: Tensor
    true_N: Tensor
    slope_N: Tensor
    pass_on_LNIQ: Tensor
    take_LNQJ: Tensor
    mix_LNIJ: Tensor
    own_LNJ: Tensor

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
        kernels: bool = True,
    ) -> None:
        super().__init__()
        B, (L, E), W = batch_size, popularity_LE.shape, COPY_WINDOW
        N, G, Q = len(nets), len(discounts), nets[0].carry.out_features
        self.before = nn.ModuleList(map(ForecasterBefore, nets))
        self._top_k, self._num_known = top_k, len(token_ids_V)

        def buffer(name: str, value: Tensor) -> None:
            self.register_buffer(name, value.clone(), persistent=False)

        buffer("next_LE", torch.zeros(L, E))
        buffer("forecast_LE", torch.zeros(L, E))
        buffer("rows_BRLE", torch.zeros(B, NUM_ROWS, L, E))
        buffer("age_BLE", torch.zeros(B, L, E))
        buffer("ids_BW", torch.zeros(B, W, dtype=torch.int64))
        buffer("match_BW", torch.zeros(B, W, dtype=torch.int64))
        buffer("uses_BWJ", torch.zeros(B, W, L * E))
        buffer("slot_of_place_W", torch.arange(W))  # of the ring
        buffer("tokens_B3", torch.zeros(B, NUM_TOKENS_READ, dtype=torch.int64))
        # What nets said of *later* before the token at hand: log odds if it does not use an expert,
        # what is added if it does, and what each layer is given by those before it.
        buffer("later_LNBGE", torch.zeros(L, N, B, G, E))
        buffer("used_LNBGE", torch.zeros(L, N, B, G, E))
        buffer("carried_LNBQ", torch.zeros(L, N, B, Q))
        buffer("answers_SE", torch.zeros(N * B, E))
        # Constants are buffers, too: made inside a graph they would be copies from the host.
        own_NRLGE = torch.stack([net.own_later_RLGE.detach() for net in nets])
        decays_D = torch.tensor(DECAYS)
        buffer("rates_D11", 1 - decays_D[:, None, None])
        # What a use adds through its own row and the averages, whatever the past.
        averages_NLGE = torch.einsum("d,ndlge->nlge", 1 - decays_D, own_NRLGE[:, AVERAGE_ROWS])
        buffer("own_age_NLGE", own_NRLGE[:, AGE_ROW])
        buffer("gain_NLGE", own_NRLGE[:, 1] + averages_NLGE)
        buffer("first_past_RLE", first_past_RLE(popularity_LE))
        buffer("share_G", torch.tensor(discounts) / (G * N * B))  # of one answer in the mean
        buffer("weights_MN", copy_weights(torch.arange(COPY_MAX_MATCH + 1)))
        buffer("follow_MWW", copy_follow_MWW(W))
        buffer("against_M1", against_M1())
        buffer("places_W", torch.arange(W))
        buffer("token_ids_V", torch.cat([token_ids_V, token_ids_V.new_tensor([_NEVER])]))
        buffer("said_N", calibration.said_N)
        buffer("true_N", calibration.true_N)
        buffer("slope_N", slopes(calibration.said_N, calibration.true_N))
        for name, weights in (
            ("pass_on_LNIQ", [net.pass_on_LEQ for net in nets]),
            ("take_LNQJ", [net.take_LQE for net in nets]),
            ("mix_LNIJ", [net.mix_later_LEE for net in nets]),
            ("own_LNJ", [net.own_later_RLGE[0].flatten(1) for net in nets]),
        ):
            buffer(name, torch.stack([weight.detach() for weight in weights], 1))
        self._later_use: Callable[..., None] | None = None
        if kernels:
            try:
                from predictors.kernels.later_use import later_use
            except ImportError as error:
                raise ImportError(
                    f"kernels=True needs Triton ({error}): install it, or take kernels=False"
                ) from error
            self._later_use = later_use

    @torch.no_grad()
    def begin(self) -> None:
        """New requests in all rows."""
        self.rows_BRLE.zero_()
        self.rows_BRLE[:, :NUM_PAST] = as_rows(self.first_past_RLE)
        self.age_BLE.copy_(self.first_past_RLE[-1].expand_as(self.age_BLE))
        for buffer in (self.match_BW, self.uses_BWJ):
            buffer.zero_()
        self.slot_of_place_W.copy_(self.places_W)
        self.ids_BW.fill_(_EMPTY)
        self.tokens_B3.fill_(self._num_known)
        self._say()

    @torch.no_grad()
    def on_token(
        self, expert_map_BLE: Tensor | None, token_ids_B: Tensor, next_token_ids_B: Tensor
    ) -> None:
        """Add a token of each row to its past and look ahead again."""
        rows_BRLE = self.rows_BRLE
        if expert_map_BLE is not None:
            rows_BRLE[:, 0], rows_BRLE[:, 1] = top_k_map(expert_map_BLE, self._top_k)
        use_BLE = rows_BRLE[:, 1]
        rows_BRLE[:, AVERAGE_ROWS].lerp_(use_BLE[:, None], self.rates_D11)
        self.age_BLE.add_(1).mul_(1 - use_BLE)
        rows_BRLE[:, AGE_ROW] = as_age_row(self.age_BLE)
        self.ids_BW.copy_(torch.cat([self.ids_BW[:, 1:], token_ids_B[:, None]], 1))
        self.uses_BWJ.index_copy_(1, self.slot_of_place_W[:1], use_BLE.flatten(1)[:, None])
        self.slot_of_place_W.add_(1).remainder_(COPY_WINDOW)
        # A place moves left as its predecessor was: match_BW needs no roll.
        same_BW = self.ids_BW == self._sought(next_token_ids_B)[:, None]
        self.match_BW.add_(1).clamp_(max=COPY_MAX_MATCH).mul_(same_BW)
        self._copy()
        self._see(torch.stack([next_token_ids_B, token_ids_B], 1), self.tokens_B3[:, 1:2])
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
        ids_BT, rows_BRLE = token_ids_BT[:, -T:], self.rows_BRLE
        since_T = torch.arange(T - 1, -1, -1, device=use_BTLE.device)
        for d, decay in enumerate(DECAYS):
            weight_T = (1 - decay) * decay ** since_T.float()
            rows_BRLE[:, AVERAGE_ROWS][:, d].mul_(decay**T).add_(
                torch.einsum("t,btle->ble", weight_T, use_BTLE)
            )
        age_BTLE = torch.where(use_BTLE > 0, since_T[:, None, None].float(), torch.inf)
        self.age_BLE.add_(T).copy_(torch.minimum(self.age_BLE, age_BTLE.amin(1)))
        rows_BRLE[:, AGE_ROW] = as_age_row(self.age_BLE)
        rows_BRLE[:, 0], rows_BRLE[:, 1] = map_BTLE[:, -1], use_BTLE[:, -1]
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
        before_last_B1 = self.ids_BW[:, -2, None]
        self._see(torch.stack([next_token_ids_B, ids_BT[:, -1]], 1), self._rows(before_last_B1))
        self._say()

    @torch.no_grad()
    def on_routed(
        self,
        layer: int,
        topk_expert_ids_BK: Tensor,
        topk_probs_BK: Tensor,
        out_E: Tensor | None = None,
    ) -> Tensor:
        """What the layer's experts are worth after this token; `ForecasterNet.after_layer`."""
        if out_E is None:
            out_E = torch.empty_like(self.next_LE[layer])
        if self._later_use is None:
            return self._answer_in_torch(layer, topk_expert_ids_BK, topk_probs_BK, out_E)
        is_last, alone = layer + 1 == len(self.carried_LNBQ), len(self.answers_SE) == 1
        self._later_use(
            topk_expert_ids_BK=topk_expert_ids_BK.contiguous(),
            topk_probs_BK=topk_probs_BK.contiguous(),
            carried_NBQ=self.carried_LNBQ[layer],
            passed_on_NBQ=None if is_last else self.carried_LNBQ[layer + 1],
            pass_on_NIQ=self.pass_on_LNIQ[layer],
            take_NQJ=self.take_LNQJ[layer],
            mix_NIJ=self.mix_LNIJ[layer],
            own_NJ=self.own_LNJ[layer],
            said_NBJ=self.later_LNBGE[layer],
            used_NBJ=self.used_LNBGE[layer],
            share_G=self.share_G,
            map_BE=self.rows_BRLE[:, 0, layer],
            use_BE=self.rows_BRLE[:, 1, layer],
            answers_SE=out_E[None] if alone else self.answers_SE,
        )
        return out_E if alone else torch.sum(self.answers_SE, 0, out=out_E)

    def _answer_in_torch(
        self, layer: int, topk_expert_ids_BK: Tensor, topk_probs_BK: Tensor, out_E: Tensor
    ) -> Tensor:
        """What `kernels.later_use` computes; also its reference."""
        map_BE, use_BE = self.rows_BRLE[:, 0, layer], self.rows_BRLE[:, 1, layer]
        probs_BK = topk_probs_BK.float()
        probs_BK = probs_BK / probs_BK.sum(-1, keepdim=True)
        map_BE.zero_().scatter_(1, topk_expert_ids_BK, probs_BK)
        use_BE.zero_().scatter_(1, topk_expert_ids_BK, 1.0)
        routed_BI = torch.cat([map_BE, use_BE], 1)
        out_E.zero_()
        for n, later_BGE in enumerate(self.later_LNBGE[layer]):
            carried_BQ = torch.addmm(
                self.carried_LNBQ[layer, n], routed_BI, self.pass_on_LNIQ[layer, n]
            )
            if layer + 1 < len(self.carried_LNBQ):
                self.carried_LNBQ[layer + 1, n] = carried_BQ
            mixed_BJ = torch.addmm(
                routed_BI @ self.mix_LNIJ[layer, n], F.gelu(carried_BQ), self.take_LNQJ[layer, n]
            )
            log_odds_BGE = mixed_BJ.view_as(later_BGE) + later_BGE
            own_GE = self.own_LNJ[layer, n].view_as(log_odds_BGE[0])
            log_odds_BGE.addcmul_(map_BE[:, None], own_GE)
            log_odds_BGE.addcmul_(use_BE[:, None], self.used_LNBGE[layer, n])
            out_E += torch.einsum("g,bge->e", self.share_G, log_odds_BGE.sigmoid_())
        return out_E

    def _sought(self, token_ids_B: Tensor) -> Tensor:
        """What to look for in the window: nothing, where an id is not known."""
        return token_ids_B.masked_fill(token_ids_B < 0, _NEVER)

    def _rows(self, token_ids: Tensor) -> Tensor:
        """The tokens' embedding rows."""
        row = torch.searchsorted(self.token_ids_V, token_ids.contiguous())
        return row.masked_fill(self.token_ids_V[row] != token_ids, self._num_known)

    def _see(self, next_and_last_B2: Tensor, row_before_B1: Tensor) -> None:
        self.tokens_B3.copy_(torch.cat([self._rows(next_and_last_B2), row_before_B1], 1))

    def _copy(self) -> None:
        """`token_history` on copies, over the whole window at once."""
        place_of_slot_W = (self.places_W - self.slot_of_place_W[:1]).remainder_(COPY_WINDOW)
        # An empty place shares nothing, so that it counts for nothing.
        last_BJ1 = self.rows_BRLE[:, 1].flatten(1)[..., None]
        sharp = ECHO_SHARPNESS / (self._top_k * len(self.next_LE))
        shared_BW1 = torch.baddbmm(last_BJ1[:, :1], self.uses_BWJ, last_BJ1, beta=0, alpha=sharp)
        echo_BW = shared_BW1[..., 0].expm1_().index_select(1, self.slot_of_place_W)
        weights_MBW = torch.cat([self.weights_MN[:, self.match_BW], echo_BW.expand(2, -1, -1)])
        # The last place has no successor yet: nothing follows it, and it does not count.
        total_MB = self.against_M1 + weights_MBW[..., :-1].sum(-1)
        spread_MBW = (weights_MBW @ self.follow_MWW).index_select(2, place_of_slot_W)
        copies_BMJ = torch.bmm(spread_MBW.transpose(0, 1), self.uses_BWJ)
        copies_BMLE = self.rows_BRLE[:, NUM_PAST:]
        torch.div(copies_BMJ.view(copies_BMLE.shape), total_MB.T[..., None, None], out=copies_BMLE)

    def _say(self) -> None:
        age_BL1E = as_age_row(self.age_BLE + 1)[:, :, None]  # of what the token does not use
        likely_BL2E = []
        for n, before in enumerate(self.before):
            said_BLXE, self.carried_LNBQ[0, n] = before(self.rows_BRLE, self.tokens_B3)
            aged_BLGE = age_BL1E * self.own_age_NLGE[n]
            later_BLGE, used_BLGE = (
                said_LNBGE[:, n].transpose(0, 1)
                for said_LNBGE in (self.later_LNBGE, self.used_LNBGE)
            )
            torch.add(said_BLXE[:, :, 2:], aged_BLGE, out=later_BLGE)
            torch.sub(self.gain_NLGE[n], aged_BLGE, out=used_BLGE)
            likely_BL2E.append(said_BLXE[:, :, :2].sigmoid())
        mean_BL2E = likely_BL2E[0]
        if len(likely_BL2E) > 1:  # one net spares the launches
            mean_BL2E = torch.stack(likely_BL2E).mean(0)
        next_BLE, ahead_BLE = mean_BL2E.unbind(2)
        next_BLE = interpolate(next_BLE, self.said_N, self.true_N, self.slope_N)
        torch.mean(next_BLE, 0, out=self.next_LE)
        torch.mean(torch.maximum(next_BLE, ahead_BLE), 0, out=self.forecast_LE)
