"""What `gate_mlp` makes of a token's embedding and of those before it, in place of layer 0.

A router of layer 0 reads the embedding plus what the attention of layer 0 adds from earlier tokens.
That sum is learned here, from scratch and much smaller: none of the model's attention weights are
read. Plain torch; what it returns for a token depends on no later one, and on as many earlier ones
as its window holds, of which the caller remembers the ids. Knows nothing of routers.

Shape letters: N tokens of several requests · D hidden · A heads · C numbers of a head · W tokens of
a window · M blocks of W tokens.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NUM_HEADS: Final = 4
_KEY_SIZE: Final = 32  # a head, even
_VALUE_SIZE: Final = 64  # a head
_SLOWEST: Final = 10_000.0  # tokens to the slowest turn of a key, over 2 pi


class TokenContext(nn.Module):
    """A token's embedding plus a causal attention over the embeddings of a window.

    Keys and queries have unit length and are turned by their position (RoFormer, arXiv:2104.09864,
    section 3.2); what is added to a score by distance is learned, and starts as a slope of its own
    for each head (ALiBi, arXiv:2108.12409, section 3). Nothing is added until it is trained.

    Args:
        size: D.
        window: W, the token itself and those before it.
    """

    def __init__(self, *, size: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.query = nn.Parameter(torch.randn(size, _NUM_HEADS * _KEY_SIZE) / size**0.5)
        self.key = nn.Parameter(torch.randn(size, _NUM_HEADS * _KEY_SIZE) / size**0.5)
        self.value = nn.Parameter(torch.randn(size, _NUM_HEADS * _VALUE_SIZE) / size**0.5)
        self.out = nn.Parameter(torch.zeros(_NUM_HEADS * _VALUE_SIZE, size))
        slopes_A = 2.0 ** -torch.linspace(1, 5, _NUM_HEADS)
        self.distance_AW = nn.Parameter(-slopes_A[:, None] * torch.arange(window))

    def forward(self, embedded_ND: Tensor, starts_N: Tensor) -> Tensor:
        """float32 [N, D] at root mean square 1.

        Args:
            embedded_ND: float32, requests one after the other.
            starts_N: bool, a request's first token; it sees none before it.
        """
        num_tokens, window = len(embedded_ND), self.window
        rest = -num_tokens % window
        request_MW = F.pad(starts_N.cumsum(0), (0, rest), value=-1).view(-1, window)
        query, key, value = (
            self._in_blocks(projected, rest)
            for projected in (
                unit_length(_by_head(embedded_ND @ self.query)),
                unit_length(_by_head(embedded_ND @ self.key)),
                _by_head(embedded_ND @ self.value),
            )
        )
        # A block's tokens see those of their own block and of the one before, 2 W in all.
        place = torch.arange(2 * window, device=embedded_ND.device)
        distance = place[window:, None] - place
        bias = self.distance_AW[:, distance.clamp(0, window - 1)]
        seen_request = _with_block_before(request_MW, -2)
        is_seen = (request_MW[:, :, None] == seen_request[:, None, :]) & (
            (distance >= 0) & (distance < window)
        )
        scores = turned(query, place[window:]) @ turned(_with_block_before(key), place).transpose(
            -1, -2
        )
        scores = scores.float() / _KEY_SIZE**0.5 + bias
        shares = scores.masked_fill(~is_seen[:, None], -torch.inf).softmax(-1)
        read = (shares @ _with_block_before(value)).transpose(1, 2).flatten(2).flatten(0, 1)
        return unit_length(embedded_ND + (read @ self.out)[:num_tokens])

    def _in_blocks(self, values_NAC: Tensor, rest: int) -> Tensor:
        """[M, A, W, C], with ``rest`` tokens of zeros at the end."""
        padded = F.pad(values_NAC, (0, 0, 0, 0, 0, rest))
        return padded.view(-1, self.window, *padded.shape[1:]).transpose(1, 2)


def turned(values: Tensor, place_T: Tensor) -> Tensor:
    """Each pair of numbers (i, i + C/2) of [..., T, C] turned by place x its frequency."""
    half = values.shape[-1] // 2
    frequency = _SLOWEST ** (-torch.arange(half, device=values.device) / half)
    angle = place_T[:, None] * frequency
    one, other = values[..., :half], values[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def unit_length(vector: Tensor) -> Tensor:
    """Vectors [..., D] at root mean square 1, float32; zeros stay zeros."""
    vector = vector.float()
    return vector * torch.rsqrt(vector.square().mean(-1, keepdim=True) + 1e-6)


def _by_head(values_NX: Tensor) -> Tensor:
    return values_NX.view(len(values_NX), _NUM_HEADS, -1)


def _with_block_before(blocks: Tensor, first: float = 0.0) -> Tensor:
    """[M, ..., W, C] or [M, W] to twice as many tokens; before the first block stands ``first``."""
    before = torch.cat([torch.full_like(blocks[:1], first), blocks[:-1]])
    return torch.cat([before, blocks], dim=1 if blocks.dim() == 2 else 2)
