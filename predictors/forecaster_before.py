"""What the forecaster says before a token is routed, in few launches: for a captured CUDA graph.

`ForecasterNet.before` is written to be trained and read: each head and each term by itself. In a
graph, every launch takes longer to start than its few numbers take. So here the same weights are
laid side by side once, and what differs only in which of them it reads is one product.

Shape letters: B rows of a batch · L MoE layers · E experts per layer · R rows of a history ·
G discounts · H hidden · Q carried · X = 2 + G things said: next, ahead, and later for each G ·
I = 2 * E: a map and a use side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.forecaster_net import ForecasterNet
from predictors.token_history import AGE_ROW, AVERAGE_ROWS, DECAYS


class ForecasterBefore(nn.Module):
    """The part of a net that comes before the token at hand.

    Args:
        net: Fitted, in evaluation mode. Its embedding and its first layer are taken, not copied.
    """

    heads_OH: Tensor
    bias_O: Tensor
    own_RLXE: Tensor
    mix_LIJ: Tensor

    def __init__(self, net: ForecasterNet) -> None:
        super().__init__()
        L, E = self._shape_LE = net.shape_LE
        self.embedding, self.read, self.read_tokens = net.embedding, net.read, net.read_tokens
        self._carry_dim = net.carry.out_features

        def side_by_side(name: str) -> Tensor:
            said_LXE = [
                getattr(head, name).detach().unflatten(0, (L, -1, E))
                for head in (net.say_next, net.say_ahead, net.say_later)
            ]
            return torch.cat([torch.cat(said_LXE, 1).flatten(0, 2), getattr(net.carry, name)])

        own_RLXE = torch.cat(
            [
                net.own_next_RLE[:, :, None],
                net.own_ahead_RLE[:, :, None],
                own_of_unused_RLGE(net),
            ],
            dim=2,
        )
        for name, value in (
            ("heads_OH", side_by_side("weight")),
            ("bias_O", side_by_side("bias")),
            ("own_RLXE", own_RLXE),
            ("mix_LIJ", torch.cat([net.mix_next_LEE, net.mix_ahead_LEE], dim=2)),
        ):
            self.register_buffer(name, value.detach(), persistent=False)

    def forward(self, rows_BRLE: Tensor, tokens_B3: Tensor) -> tuple[Tensor, Tensor]:
        """Log odds of all that is said, and what the first layer is given.

        Args:
            rows_BRLE: As `ForecasterNet.before`'s.
            tokens_B3: Likewise.

        Returns:
            float32 [B, L, X, E], where *later* is that of an expert which the token does not use,
            but for its age; and float32 [B, Q].
        """
        embedded = self.embedding(tokens_B3).flatten(1)
        read_BH = torch.addmm(self.read(rows_BRLE.flatten(1)), embedded, self.read_tokens.weight.T)
        said_BO = F.linear(F.gelu(read_BH), self.heads_OH, self.bias_O)
        (L, E), B, num_said = self._shape_LE, len(said_BO), self.own_RLXE.shape[2]
        said_BLXE = said_BO[:, : -self._carry_dim].view(B, L, num_said, E)
        said_BLXE = said_BLXE + (rows_BRLE[:, :, :, None] * self.own_RLXE).sum(1)
        routed_LBI = rows_BRLE[:, :2].permute(2, 0, 1, 3).reshape(L, B, 2 * E)
        mixed_LBJ = torch.bmm(routed_LBI, self.mix_LIJ)
        said_BLXE[:, :, :2].add_(mixed_LBJ.transpose(0, 1).view(B, L, 2, E))
        return said_BLXE, said_BO[:, -self._carry_dim :]


def own_of_unused_RLGE(net: ForecasterNet) -> Tensor:
    """What *later* makes of an expert's rows as they are before a token that does not use it.

    Its averages will have faded by then. Its map is the token's, its age is not linear in what it
    is now: both are added by themselves.
    """
    own_RLGE = net.own_later_RLGE.detach().clone()
    own_RLGE[:2] = 0.0
    own_RLGE[AVERAGE_ROWS] *= torch.tensor(DECAYS)[:, None, None, None]
    own_RLGE[AGE_ROW] = 0.0
    return own_RLGE
