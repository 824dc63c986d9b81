"""Routing of a real trace in place of a model's own, in eager mode and inside a graph alike.

A hook on each router puts the recorded experts and weights where the router's own choice was. It
reads them from a device tensor at a position that the device counts itself, so that nothing waits
for the host. The truth about later use, which Belady's policy asks for, is at hand the same way.

Shape letters: T tokens · N replayed tokens · B rows of a batch · L MoE layers · E experts per
layer · K experts per token · M ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.replay_shapes import Shape
from data.adapters import MoELayer
from data.importers import load_traces
from data.schema import Trace, TraceList, TraceSet
from data.splits import split_by_topic


@dataclass(frozen=True, kw_only=True)
class Route:
    """The recorded routing of consecutive tokens, and the truth about what comes after each.

    Attributes:
        ids_NLK: int64.
        weights_NLK: float32, each token's weights sum to 1.
        next_use_NLE: float32, minus the number of the next token that uses the expert, -inf =
            never: what `Belady` is told of the time after token n.
        token_ids_N: int64, what was fed; -1 = not recorded.
        starts_N: bool on the host, a request's first token.
        digest: Names the trace's content.
    """

    ids_NLK: Tensor
    weights_NLK: Tensor
    next_use_NLE: Tensor
    token_ids_N: Tensor
    starts_N: Tensor
    digest: str

    @classmethod
    def of(
        cls,
        ids_NLK: Tensor,
        weights_NLK: Tensor,
        num_experts: int,
        digest: str,
        *,
        token_ids_N: Tensor | None = None,
        starts_N: Tensor | None = None,
    ) -> "Route":
        """Normalise the weights and look ahead; by default all is one request without ids."""
        num_tokens = len(ids_NLK)
        total_NL1 = weights_NLK.sum(-1, keepdim=True).clamp_min(1e-9)
        return cls(
            ids_NLK=ids_NLK,
            weights_NLK=weights_NLK / total_NL1,
            next_use_NLE=next_use(ids_NLK, num_experts),
            token_ids_N=torch.full((num_tokens,), -1) if token_ids_N is None else token_ids_N,
            starts_N=torch.arange(num_tokens) == 0 if starts_N is None else starts_N,
            digest=digest,
        )

    @classmethod
    def recorded(
        cls, shape: Shape, num_tokens: int, *, num_layers: int, num_experts: int
    ) -> "Route":
        """Tokens ``start .. start + num_tokens`` of the shape's trace, each as one decode step.

        Requests follow each other as they were recorded; the cache lives through them.

        Raises:
            ValueError: The trace is too short, or not of this shape.
        """
        traces = traces_of_shape(shape)
        top_k = shape.config["num_experts_per_tok"]
        spec = traces.spec
        if (spec.num_layers, spec.num_experts, spec.top_k) != (num_layers, num_experts, top_k):
            raise ValueError(
                f"trace {shape.trace}: {spec.describe()}, the model has {num_layers} MoE layers x "
                f"{num_experts} experts, top-{top_k}"
            )
        requests = [
            trace
            for trace in (traces[i] for i in range(len(traces)))
            if not shape.held_out or traces.split[trace.request_id] == "test"
        ]
        stop = shape.start + num_tokens
        ids_NLK = np.concatenate([trace.topk_expert_ids_TLK for trace in requests])[:stop]
        if len(ids_NLK) < stop:
            raise ValueError(
                f"trace {shape.trace} has {len(ids_NLK)} tokens: {stop} are needed for "
                f"{num_tokens} from {shape.start} on"
            )
        weights_NLK = np.ones(ids_NLK.shape, np.float32)
        if all(trace.topk_probs_TLK is not None for trace in requests):
            weights_NLK = np.concatenate([t.topk_probs_TLK for t in requests])[:stop]  # type: ignore[misc]
        rows = slice(shape.start, stop)
        starts = np.concatenate([np.arange(trace.num_tokens) == 0 for trace in requests])
        token_ids = np.concatenate([_token_ids(trace) for trace in requests])
        return cls.of(
            torch.from_numpy(ids_NLK[rows].astype(np.int64)),
            torch.from_numpy(weights_NLK[rows].astype(np.float32)),
            num_experts,
            traces.digest,
            token_ids_N=torch.from_numpy(token_ids[rows]),
            starts_N=torch.from_numpy(starts[rows]),
        )

    def rows(self, batch: int) -> list["Route"]:
        """Cut into equal parts, to be replayed side by side; each looks ahead in itself."""
        num_tokens = len(self.ids_NLK) // batch
        num_experts = self.next_use_NLE.shape[-1]
        parts = [slice(b * num_tokens, (b + 1) * num_tokens) for b in range(batch)]
        return [
            Route.of(
                self.ids_NLK[part],
                self.weights_NLK[part],
                num_experts,
                self.digest,
                token_ids_N=self.token_ids_N[part],
                starts_N=self.starts_N[part],
            )
            for part in parts
        ]

    @classmethod
    def drawn(cls, num_tokens: int, *, num_layers: int, num_experts: int, top_k: int) -> "Route":
        """A random routing in which each layer has favourites; for tests."""
        generator = torch.Generator().manual_seed(0)
        taste_LE = torch.rand(num_layers, num_experts, generator=generator) * 2
        noise_NLE = torch.rand(num_tokens, num_layers, num_experts, generator=generator)
        weights_NLK, ids_NLK = (taste_LE + noise_NLE).topk(top_k)
        return cls.of(ids_NLK, weights_NLK, num_experts, "drawn with seed 0")


def next_use(ids_NLM: Tensor, num_experts: int) -> Tensor:
    """Minus the number of the next step that uses each expert, [N, L, E]; -inf = none does.

    Args:
        ids_NLM: What each step uses in each layer, of one token or of several.
        num_experts: E.
    """
    num_steps, num_layers, _ = ids_NLM.shape
    next_use_NLE = torch.empty(num_steps, num_layers, num_experts)
    next_LE = torch.full((num_layers, num_experts), -torch.inf)
    for n in range(num_steps - 1, -1, -1):
        next_use_NLE[n] = next_LE
        next_LE.scatter_(1, ids_NLM[n], -float(n))
    return next_use_NLE


def traces_of_shape(shape: Shape) -> TraceSet:
    """The shape's traces, split by topic, always in the same way."""
    traces = load_traces(shape.trace)
    if not shape.held_out:
        return traces
    assert isinstance(traces, TraceList)
    topic_of = {trace.request_id: trace.topic for trace in traces.traces}
    return replace(traces, split=split_by_topic(topic_of, seed=0))


def _token_ids(trace: Trace) -> npt.NDArray[np.int64]:
    """What was fed for each routed token."""
    if trace.token_ids_P is None:
        return np.full(trace.num_tokens, -1)
    first = trace.first_routed_position
    return trace.token_ids_P[first : first + trace.num_tokens].astype(np.int64)


class ForcedRouting:
    """Hooks that make a model route as recorded, token after token.

    Args:
        layers: Of the model.
        routes: One for each row of the batch, equally long.
        device: Of the model.

    Attributes:
        ids_NBLK: int64 on the device, what is replayed.
        weights_NBLK: float32, likewise.
        next_use_NLE: float32, the truth about the whole batch's later use.
        position_1: int64 on the device, the token that the next forward pass replays; it counts by
            itself (in the last layer's router) and wraps around.
        forecast_LE: float32 [L, E] on the device, what is true of the time after that token; made
            ready before layer 0 computes its experts.
    """

    def __init__(
        self, layers: list[MoELayer], routes: Sequence[Route], device: torch.device
    ) -> None:
        self.ids_NBLK = torch.stack([route.ids_NLK for route in routes], 1).to(device)
        self.weights_NBLK = torch.stack([route.weights_NLK for route in routes], 1).to(device)
        num_experts = routes[0].next_use_NLE.shape[-1]
        ids_NLM = self.ids_NBLK.transpose(1, 2).flatten(2).cpu()
        self.next_use_NLE = next_use(ids_NLM, num_experts).to(device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.forecast_LE = torch.zeros_like(self.next_use_NLE[0])
        self._handles = [
            moe.router.register_forward_hook(self._hook_of(moe.layer, len(layers)))
            for moe in layers
        ]

    def seek(self, position: int) -> None:
        """Let the next forward pass replay token ``position``."""
        self.position_1.fill_(position)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook_of(self, layer: int, num_layers: int) -> Any:
        def hook(router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits, weights_TK, ids_TK = output
            if layer == 0:
                self.forecast_LE.copy_(self.next_use_NLE.index_select(0, self.position_1)[0])
            ids_TK = self.ids_NBLK[:, :, layer].index_select(0, self.position_1)[0].to(ids_TK.dtype)
            weights = self.weights_NBLK[:, :, layer].index_select(0, self.position_1)[0]
            if layer == num_layers - 1:
                self.position_1.add_(1).remainder_(len(self.ids_NBLK))
            return logits, weights.to(weights_TK.dtype), ids_TK

        return hook
