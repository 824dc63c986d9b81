"""The forecaster's network: a request's past in, three kinds of log odds out.

A plain module over plain tensors, so that it can be trained by anyone and run anywhere; it knows
neither traces nor tokens' texts. With G discounts ``g``, a distance ``d`` = 1 for the very next
token, and every probability given as its log odds:

- **next**: use by the next token;
- **ahead**: mean over g of ``g^(d-1)``, d counted from the next token to the expert's next use;
- **later**: ``g^(d-1)`` for each g, d counted from the token after it, once a layer has routed it.

One hidden layer reads all layers' rows at once. What an expert's own rows, and its layer's last
map, say of it is added through small direct terms, so that the hidden layer need not carry them.
*later* also sees the token's own routing, layer by layer: layer l's output depends on layers 0..l
of that token and on nothing else of it, because what a layer adds is summed up from the front.

Shape letters: B tokens · L MoE layers · E experts per layer · R rows (`predictors.token_history`) ·
G discounts · H hidden · Q what layers pass on to those after them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.token_history import NUM_ROWS, NUM_TOKENS_READ

_TOKEN_DROPOUT = 0.3  # a token is seen a few times only: half of its embedding would be too much


class Before(NamedTuple):
    """What is said before a token is routed, and what `ForecasterNet.after` needs of it."""

    next_BLE: Tensor
    ahead_BLE: Tensor
    later_BLGE: Tensor  # the part of *later* that is known already
    carry_BQ: Tensor


class ForecasterNet(nn.Module):
    """See the module's docstring.

    Args:
        num_layers: L.
        num_experts: E.
        num_tokens: Tokens that have an embedding; row ``num_tokens`` is for all others.
        num_discounts: G.
        hidden_dim: H.
        token_dim: Of a token's embedding.
        carry_dim: Q.
        dropout: Of inputs and of the hidden layer; token embeddings have `_TOKEN_DROPOUT`.
        token_dropout: Share of token ids that training hides, so that it learns to do without.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        num_tokens: int,
        num_discounts: int,
        hidden_dim: int = 1024,
        token_dim: int = 64,
        carry_dim: int = 128,
        dropout: float = 0.5,
        token_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        L, E, G = num_layers, num_experts, num_discounts
        self.shape_LE = (L, E)
        self.num_tokens = num_tokens
        self.dropout, self.token_dropout = dropout, token_dropout
        self.embedding = nn.Embedding(num_tokens + 1, token_dim)
        self.read = nn.Linear(NUM_ROWS * L * E, hidden_dim)
        self.read_tokens = nn.Linear(NUM_TOKENS_READ * token_dim, hidden_dim, bias=False)
        self.say_next = nn.Linear(hidden_dim, L * E)
        self.say_ahead = nn.Linear(hidden_dim, L * E)
        self.say_later = nn.Linear(hidden_dim, L * G * E)
        self.carry = nn.Linear(hidden_dim, carry_dim)
        self.pass_on_LEQ = nn.Parameter(0.05 * torch.randn(L, 2 * E, carry_dim))
        self.take_LQE = nn.Parameter(torch.zeros(L, carry_dim, G * E))
        # An expert's own rows, and its layer's last map and use.
        self.own_next_RLE = nn.Parameter(torch.zeros(NUM_ROWS, L, E))
        self.own_ahead_RLE = nn.Parameter(torch.zeros(NUM_ROWS, L, E))
        self.own_later_RLGE = nn.Parameter(torch.zeros(NUM_ROWS, L, G, E))
        self.mix_next_LEE = nn.Parameter(torch.zeros(L, 2 * E, E))
        self.mix_ahead_LEE = nn.Parameter(torch.zeros(L, 2 * E, E))
        self.mix_later_LEE = nn.Parameter(torch.zeros(L, 2 * E, G * E))
        for head in (self.say_next, self.say_ahead, self.say_later):
            nn.init.normal_(head.weight, std=0.1 / hidden_dim**0.5)

    def start_at(self, next_LE: Tensor, ahead_LE: Tensor, later_LGE: Tensor) -> None:
        """Begin with these mean outputs, as probabilities."""
        heads = (self.say_next, self.say_ahead, self.say_later)
        for head, mean in zip(heads, (next_LE, ahead_LE, later_LGE), strict=True):
            head.bias.data.copy_(mean.clamp(1e-3, 1 - 1e-3).logit().flatten())

    def before(self, rows_BRLE: Tensor, tokens_B3: Tensor) -> Before:
        """What is said before a token is routed.

        Args:
            rows_BRLE: float32, `History.rows_RLE`.
            tokens_B3: int64, embedding rows of the next token, the last one and the one before.
        """
        if self.training and self.token_dropout:
            hidden = torch.rand(tokens_B3.shape, device=tokens_B3.device) < self.token_dropout
            tokens_B3 = tokens_B3.masked_fill(hidden, self.num_tokens)
        embedded = _dropout(self.embedding(tokens_B3).flatten(1), _TOKEN_DROPOUT, self.training)
        rows = _dropout(rows_BRLE.flatten(1), self.dropout, self.training)
        hidden_BH = F.gelu(self.read(rows) + self.read_tokens(embedded))
        hidden_BH = _dropout(hidden_BH, self.dropout, self.training)
        routed_BLE = _last_routed(rows_BRLE)
        own_next, own_ahead = (
            (rows_BRLE * own_RLE).sum(1) for own_RLE in (self.own_next_RLE, self.own_ahead_RLE)
        )
        return Before(
            self.say_next(hidden_BH).unflatten(-1, self.shape_LE)
            + own_next
            + _per_layer(routed_BLE, self.mix_next_LEE),
            self.say_ahead(hidden_BH).unflatten(-1, self.shape_LE)
            + own_ahead
            + _per_layer(routed_BLE, self.mix_ahead_LEE),
            self.say_later(hidden_BH).unflatten(-1, (self.shape_LE[0], -1, self.shape_LE[1])),
            self.carry(hidden_BH),
        )

    def after(self, said: Before, rows_BRLE: Tensor) -> Tensor:
        """*later* of every layer, once the token has been routed in all: [B, L, G, E].

        Args:
            said: `before` of the same tokens.
            rows_BRLE: float32, the rows with the token added (`History.after_RE`).
        """
        routed_BLE = _last_routed(rows_BRLE)
        carried_BLQ = _per_layer(routed_BLE, self.pass_on_LEQ).cumsum(1) + said.carry_BQ[:, None]
        passed_BLQ = _dropout(F.gelu(carried_BLQ), self.dropout, self.training)
        mixed_BLJ = _per_layer(routed_BLE, self.mix_later_LEE)
        mixed_BLJ = mixed_BLJ + _per_layer(passed_BLQ, self.take_LQE)
        own_BLGE = torch.einsum("brle,rlge->blge", rows_BRLE, self.own_later_RLGE)
        return said.later_BLGE + own_BLGE + mixed_BLJ.view_as(own_BLGE)

    def after_layer(self, said: Before, layer: int, rows_RE: Tensor) -> tuple[Tensor, Before]:
        """*later* of one layer of one token: what `after` says of it, in turn from layer 0.

        Args:
            said: `before` of the token, B = 1, or what this returned for the layer before.
            layer: The layer that has routed.
            rows_RE: float32, its rows with the token added.

        Returns:
            float32 [G, E], and what the next layer is to be given.
        """
        routed = torch.cat([rows_RE[0], rows_RE[1]])
        carried_BQ = said.carry_BQ + routed @ self.pass_on_LEQ[layer]
        mixed = routed @ self.mix_later_LEE[layer] + F.gelu(carried_BQ[0]) @ self.take_LQE[layer]
        own_GE = (rows_RE[:, None] * self.own_later_RLGE[:, layer]).sum(0)
        later_GE = said.later_BLGE[0, layer] + own_GE + mixed.view_as(own_GE)
        return later_GE, said._replace(carry_BQ=carried_BQ)


def _dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`, to the nearest 1/256, with eight draws per random number.

    On a CPU, drawing each by itself takes more than a third of a training step.
    """
    dropped = min(255, round(256 * share))
    if not training or not dropped:
        return x
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    bytes_ = words.random_(torch.iinfo(torch.int64).min, None).view(torch.uint8)[: x.numel()]
    return x * (bytes_.view(x.shape) >= dropped) * (256 / (256 - dropped))


def _last_routed(rows_BRLE: Tensor) -> Tensor:
    """The last token's map and use, side by side: [B, L, 2 * E]."""
    return torch.cat([rows_BRLE[:, 0], rows_BRLE[:, 1]], dim=-1)


def _per_layer(x_BLI: Tensor, weight_LIO: Tensor) -> Tensor:
    """Each layer's own matrix: [B, L, O]."""
    return torch.einsum("bli,lio->blo", x_BLI, weight_LIO)
