"""The network behind `gate_mlp`: plain torch, no training, no per-request state.

A **unit** is a source and the layers that it forecasts. The source of layer l's unit is what layer
l's router received; source -1 is the token's own embedding, known before layer 0. All units have
the same shape, so their weights are stacked and every operation runs for all of them at once.

Shape letters: U units · N tokens · L MoE layers · E experts per layer · K experts per token ·
D hidden · H targets of a unit · F numbers of one input · W width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.gate_context import TokenContext

EMBEDDING = -1
"""The source that stands before layer 0."""


class Units(NamedTuple):
    """Which layers are forecast from where.

    Attributes:
        sources: Of each unit: a layer, or `EMBEDDING`; ascending.
        targets: Of each unit: the layers that it forecasts, at most H of them.
    """

    sources: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, *, num_layers: int, lookahead: int, shared: bool) -> "Units":
        """Every layer from the embedding, and layers l+1..l+H from layer l.

        Args:
            num_layers: L.
            lookahead: H.
            shared: The targets of a layer share one unit; else each has a unit of its own.
        """
        most = lookahead if shared else 1
        pairs = []
        for source in range(EMBEDDING, num_layers - 1):
            last = num_layers if source == EMBEDDING else min(num_layers, source + 1 + lookahead)
            layers = range(source + 1, last)
            pairs += [(source, tuple(layers[i : i + most])) for i in range(0, len(layers), most)]
        sources, targets = zip(*pairs, strict=True)
        return cls(sources, targets)

    @property
    def most_targets(self) -> int:
        """H."""
        return max(len(targets) for targets in self.targets)

    def slice_of(self, source: int) -> slice:
        """The units of a source stand together."""
        first = self.sources.index(source)
        return slice(first, first + self.sources.count(source))

    def target_UH(self) -> Tensor:
        """int64; a unit with fewer targets repeats its last one (see `valid_UH`)."""
        most = self.most_targets
        return torch.tensor([[*t, *[t[-1]] * (most - len(t))] for t in self.targets])

    def valid_UH(self) -> Tensor:
        """bool: which entries of `target_UH` are targets."""
        return torch.tensor([[h < len(t) for h in range(self.most_targets)] for t in self.targets])


class GateNet(nn.Module):
    """One hidden layer and one residual layer per unit, and a linear head per target.

    All units read one `TokenContext`, and have a linear way from it to the scores besides: without
    that, layer 0 is foreseen two points worse. Heads start at zero: what the network adds to a base
    ranking is nothing until it is trained.

    Args:
        num_units: U.
        num_targets: H.
        num_experts: E.
        hidden_size: D of the token embeddings.
        input_sizes: F of each other input by name.
        width: W.
        window: Tokens that the context reads.
    """

    def __init__(
        self,
        *,
        num_units: int,
        num_targets: int,
        num_experts: int,
        hidden_size: int,
        input_sizes: Mapping[str, int],
        width: int,
        window: int,
    ) -> None:
        super().__init__()
        self.num_targets, self.num_experts = num_targets, num_experts
        self.context = TokenContext(size=hidden_size, window=window)
        sizes = {"context": hidden_size, **input_sizes}
        fan_in = sum(sizes.values())
        self.read = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(num_units, size, width) / fan_in**0.5)
                for name, size in sizes.items()
            }
        )
        self.read_bias = nn.Parameter(torch.zeros(num_units, 1, width))
        self.hidden = nn.Parameter(torch.randn(num_units, width, width) / width**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(num_units, 1, width))
        self.head = nn.Parameter(torch.zeros(num_units, width, num_targets * num_experts))
        self.direct = nn.Parameter(torch.zeros(num_units, hidden_size, num_targets * num_experts))
        self.head_bias = nn.Parameter(torch.zeros(num_units, 1, num_targets * num_experts))
        self.base_scale = nn.Parameter(torch.ones(num_units, 1, num_targets, 1))

    def forward(
        self,
        context_ND: Tensor,
        inputs: Mapping[str, Tensor],
        base_UNHE: Tensor,
        units: slice = slice(None),
    ) -> Tensor:
        """Scores, float32 [U, N, H, E].

        Args:
            context_ND: What `context` made of the tokens.
            inputs: The others by name, float32 [U, N, F]; one row for all units may stand for U.
            base_UNHE: The ranking that is corrected, float32; zeros to rank from scratch.
            units: Compute only these; inputs and base then hold only these, too.
        """
        hidden_UNW = self.read_bias[units]
        num_units = len(hidden_UNW)
        context_UND = context_ND.expand(num_units, *context_ND.shape)
        for name, weight in self.read.items():
            value = context_UND if name == "context" else inputs[name]
            value = value.expand(num_units, *value.shape[-2:])
            hidden_UNW = hidden_UNW + torch.bmm(value, weight[units])
        hidden_UNW = F.gelu(hidden_UNW)
        more_UNW = torch.bmm(hidden_UNW, self.hidden[units]) + self.hidden_bias[units]
        hidden_UNW = hidden_UNW + F.gelu(more_UNW)
        out = torch.bmm(hidden_UNW, self.head[units]) + self.head_bias[units]
        out = out + torch.bmm(context_UND, self.direct[units])
        shape = (*out.shape[:2], self.num_targets, self.num_experts)
        return self.base_scale[units] * base_UNHE + out.float().view(shape)


def sparse_map(expert_map: Tensor, top_k: int) -> Tensor:
    """The K highest entries of expert maps [..., E], as shares of their sum; the rest is 0.

    A trace may have recorded only those, so nothing else of a map is read.
    """
    probs, ids = expert_map.topk(top_k, dim=-1)
    shares = probs / probs.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.zeros_like(expert_map).scatter_(-1, ids, shares).sqrt()


def previous(values: Tensor, starts_N: Tensor, *, dim: int) -> Tensor:
    """Each token's predecessor's values along ``dim``; zeros for a request's first token."""
    shape = [1] * values.dim()
    shape[dim] = len(starts_N)
    return values.roll(1, dim).masked_fill(starts_N.view(shape), 0.0)


def gathered(values_LNX: Tensor, layers: Sequence[int]) -> Tensor:
    """Rows of a stack of layers, zeros for `EMBEDDING`: [len(layers), N, X]."""
    zeros_NX = torch.zeros_like(values_LNX[0])
    return torch.stack([zeros_NX if i == EMBEDDING else values_LNX[i] for i in layers])
