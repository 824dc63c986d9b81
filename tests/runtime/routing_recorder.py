"""Routing of requests, recorded by hooks of its own, as traces that can be replayed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.adapters import MoELayer, moe_layers, router_probs_TE
from data.schema import MoESpec, Trace, TraceList


class RoutingRecorder:
    """Records the forward passes of one request a row, without padding, until `traces`."""

    def __init__(self, model: Any) -> None:
        self._layers = moe_layers(model)
        self._passes: list[tuple[list[Tensor], list[Tensor]]] = []
        self._handles = [
            moe.router.register_forward_hook(self._hook(moe), prepend=True) for moe in self._layers
        ]

    def _hook(self, moe: MoELayer) -> Any:
        def record(router: Any, args: Any, output: Any) -> None:
            if moe.layer == 0:
                self._passes.append(([], []))
            self._passes[-1][0].append(router_probs_TE(moe, output[0]).flatten(0, -2).cpu())
            self._passes[-1][1].append(output[2].flatten(0, -2).cpu())

        return record

    def traces(self, ids_BP: Tensor, *, num_prompt: int) -> list[Trace]:
        """One for each row of what was generated."""
        rows = len(ids_BP)
        probs_BTLE, ids_BTLK = (
            torch.cat(
                [torch.stack(one[part], 1).unflatten(0, (rows, -1)) for one in self._passes], 1
            )
            for part in (0, 1)
        )
        return [
            Trace(
                request_id=str(row),
                source="test",
                topic="",
                topk_expert_ids_TLK=ids_BTLK[row].numpy().astype(np.uint8),
                num_prompt_tokens=num_prompt,
                first_routed_position=0,
                router_probs_TLE=probs_BTLE[row].numpy(),
                token_ids_P=ids_BP[row, : probs_BTLE.shape[1]].numpy().astype(np.int32),
            )
            for row in range(rows)
        ]

    def forget(self) -> None:
        self._passes.clear()


def trace_set(traces: list[Trace], spec: MoESpec) -> TraceList:
    return TraceList(spec=spec, traces=traces, split={}, digest="", probs_kind="softmax")
