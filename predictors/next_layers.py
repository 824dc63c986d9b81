"""What a token's own layers say of the layers behind them, beside what was expected of the token.

A forecast of the token as a whole is made before it is routed. Once its first layers have, they
tell more of the next ones than the tokens before it do. To the log odds of a forecast, every expert
that a layer has chosen adds what it makes of each expert in the D layers behind it:

    z[m, e] = scale[m] * logit(next[m, e]) + bias[m, e]
              + sum over the layers l <= j within D of m, and their experts x: way[l, x, m - l, e]

for a layer m behind layer j, the last one that has routed. It is linear, so that K rows of weights
and one sum are read a layer, and strictly causal: nothing of layers behind j is there to be read.
Ways are centred, a mean routing adds nothing, so that the sum is as right with few layers known as
with all.

Source: ours. FineMoE's trajectory search and ProMoE's stride prefetching look ahead from this
token's layers, too; both search or read hidden states where this adds up.

Shape letters: N tokens to learn from · T tokens · K experts per token · L MoE layers · E experts
per layer (X, of the layer that has routed) · D layers that are told of it · H layers ahead.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

DEPTH = 12
"""D, by default."""
MAX_TOKENS = 32
"""The most tokens of a step; more are a prompt."""
_LEAST = 1e-4  # probabilities count as at least this far from 0 and from 1
_PREFIX = "next_layers."


class NextLayers(nn.Module):
    """See the module's docstring; `predictors.fit.next_layers` fits it.

    Args:
        way_LXDE: float32; `way[l, x, d - 1]` is for layer l + d, and not read beyond the last one.
        scale_L: float32.
        bias_LE: float32.
        kernels: Answer in one launch (`predictors.kernels.next_layers`); False does it in torch.

    Raises:
        ImportError: ``kernels`` without Triton.
    """

    way_LXDE: Tensor
    scale_L: Tensor
    bias_LE: Tensor
    sums_TLE: Tensor
    said_LE: Tensor

    def __init__(
        self, *, way_LXDE: Tensor, scale_L: Tensor, bias_LE: Tensor, kernels: bool = True
    ) -> None:
        super().__init__()
        L, E = bias_LE.shape
        for name, value in (("way_LXDE", way_LXDE), ("scale_L", scale_L), ("bias_LE", bias_LE)):
            self.register_buffer(name, value.detach().float().contiguous())
        self.register_buffer("sums_TLE", torch.zeros(MAX_TOKENS, L, E), persistent=False)
        self.register_buffer("said_LE", torch.zeros(L, E), persistent=False)
        self._has_kernels = kernels

    @torch.no_grad()
    def look_ahead(
        self, layer: int, topk_expert_ids_TK: Tensor, next_LE: Tensor, num_asked: int
    ) -> Tensor:
        """Say what the layers behind ``layer`` use, now that it has routed.

        To be called for layers 0, 1, ... of a pass in turn; nothing is allocated, and nobody waits.

        Args:
            layer: Which has routed, below the last one.
            topk_expert_ids_TK: int64, contiguous, the experts that run; ids of E and above are
                nobody's.
            next_LE: float32, what was expected of the pass: means over its tokens.
            num_asked: H.

        Returns:
            float32 [H, E], fewer rows at the end: that any token uses an expert. It is overwritten
            by the next call.

        Raises:
            ValueError: More than `MAX_TOKENS`.
        """
        if len(topk_expert_ids_TK) > MAX_TOKENS:
            raise ValueError(f"{len(topk_expert_ids_TK)} tokens: at most {MAX_TOKENS}")
        if self._has_kernels:
            from predictors.kernels.next_layers import look_ahead  # triton is not everywhere

            look_ahead(
                layer=layer,
                topk_expert_ids_TK=topk_expert_ids_TK,
                way_LXDE=self.way_LXDE,
                next_LE=next_LE,
                scale_L=self.scale_L,
                bias_LE=self.bias_LE,
                sums_TLE=self.sums_TLE,
                said_LE=self.said_LE,
                num_asked=num_asked,
                least=_LEAST,
            )
        else:
            self._in_torch(layer, topk_expert_ids_TK, next_LE)
        return self.said_LE[layer + 1 : layer + 1 + num_asked]

    def _in_torch(self, layer: int, topk_expert_ids_TK: Tensor, next_LE: Tensor) -> None:
        """What the kernel does, for all layers behind; also its reference."""
        L, E, D, _ = self.way_LXDE.shape
        sums_TLE = self.sums_TLE[: len(topk_expert_ids_TK)]
        behind = slice(layer + 1, min(layer + 1 + D, L))
        sums_TLE[:, behind.stop - (layer + D < L) : behind.stop] = 0  # told for the first time
        if layer == 0:
            sums_TLE.zero_()
        way_XDE = torch.cat([self.way_LXDE[layer], self.way_LXDE.new_zeros(1, D, E)])
        told_TDE = way_XDE[topk_expert_ids_TK.clamp(max=E)].sum(1)
        sums_TLE[:, behind] += told_TDE[:, : behind.stop - behind.start]
        far_TLE = sums_TLE.clone()
        far_TLE[:, behind.stop :] = 0  # of an earlier pass
        log_odds_TLE = base_log_odds(next_LE, self.scale_L, self.bias_LE) + far_TLE
        self.said_LE.copy_(1 - (1 - log_odds_TLE.sigmoid()).prod(0))

    def tensors(self) -> dict[str, Tensor]:
        """For an artifact, float16."""
        return {f"{_PREFIX}{name}": tensor.half() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """Inverse of `tensors`; None where there are none of it."""
        if not any(name.startswith(_PREFIX) for name in tensors):
            return None
        way_LXDE, scale_L, bias_LE = (
            tensors[f"{_PREFIX}{name}"] for name in ("way_LXDE", "scale_L", "bias_LE")
        )
        return cls(way_LXDE=way_LXDE, scale_L=scale_L, bias_LE=bias_LE)


def base_log_odds(next_LE: Tensor, scale_L: Tensor, bias_LE: Tensor) -> Tensor:
    """Log odds before anything of a token has been routed: [..., L, E]."""
    return scale_L[:, None] * next_LE.clamp(_LEAST, 1 - _LEAST).logit() + bias_LE


def told_log_odds(use_NLE: Tensor, way_LXDE: Tensor, nearest_N: Tensor) -> Tensor:
    """What a token's layers add, of many tokens at once: [N, L, E].

    Args:
        use_NLE: float32, 1 where a token uses an expert, centred.
        way_LXDE: As `NextLayers` has it.
        nearest_N: int64, how far the nearest layer is that tells: a layer m is told by those up to
            m - nearest, and by none that is nearer.
    """
    L, _, D, _ = way_LXDE.shape
    told_NLE = torch.zeros_like(use_NLE)
    for d in range(1, min(D, L - 1) + 1):
        told = torch.einsum("nlx,lxe->nle", use_NLE[:, :-d], way_LXDE[:-d, :, d - 1])
        counts_N11 = (nearest_N <= d).float()[:, None, None]
        told_NLE = torch.cat([told_NLE[:, :d], told_NLE[:, d:] + told * counts_N11], 1)
    return told_NLE
