"""Routing of a model while it trains: a tap on its routers, a fast experts forward.

Letters: T tokens, L layers, E experts, K experts per token, D hidden, F expert inner size, X what
is left flat.
Knows the module layout that the topologies share in transformers, nothing of texts.
"""

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from data.tiny_moe.topology import MoECausalLM

DENSE_EXPERTS = "tiny_moe_dense"
"""Name under which `dense_experts` is registered as an experts implementation."""


def dense_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run all experts as one wide MLP, with routing weight 0 for those not chosen.

    The same function as the stock forward. At E·F = K·D (32·32 = 4·256 in `qwen3_moe`, 64·32 =
    8·256 in `olmoe`) its intermediates are no larger than K gathered copies of each token, and it
    needs no sort, no scatter and no matrix product with 32 columns.

    Args:
        self: A `Qwen3MoeExperts` or `OlmoeExperts` module (`gate_up_proj` `[E, 2F, D]`,
            `down_proj` `[E, D, F]`).
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]` expert ids.
        top_k_weights: `[T, K]` routing weights.

    Returns:
        `[T, D]`, in the type of `hidden_states`.
    """
    gate_up_E2FD, down_EDF = self.gate_up_proj, self.down_proj
    num_experts, inner = gate_up_E2FD.shape[0], down_EDF.shape[2]
    weights_TE = hidden_states.new_zeros(hidden_states.shape[0], num_experts, dtype=torch.float32)
    weights_TE = weights_TE.scatter(1, top_k_index, top_k_weights.float())
    both_TX = F.linear(hidden_states, gate_up_E2FD.flatten(0, 1))
    gate_TEF, up_TEF = both_TX.view(-1, num_experts, 2, inner).unbind(2)
    inner_TEF = self.act_fn(gate_TEF) * up_TEF * weights_TE.to(both_TX.dtype).unsqueeze(-1)
    out_TD = F.linear(inner_TEF.flatten(1), down_EDF.transpose(0, 1).flatten(1))
    return out_TD.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(DENSE_EXPERTS, dense_experts)


class RouterTap:
    """Keep what each router saw and chose in the last forward pass; a context manager.

    The logits are computed again from the router's input, because what a router returns beside
    the chosen ids differs between transformers releases.
    """

    def __init__(self, model: MoECausalLM) -> None:
        """Name the model to listen to; nothing is attached before `with`."""
        self._routers = [layer.mlp.gate for layer in model.model.layers]
        self._handles: list[Any] = []

    def __enter__(self) -> "RouterTap":
        """Attach the hooks."""
        self._handles = [router.register_forward_hook(_remember) for router in self._routers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks and what they kept."""
        for handle in self._handles:
            handle.remove()
        for router in self._routers:
            for name in ("tapped_input_TD", "tapped_ids_TK"):
                if hasattr(router, name):
                    delattr(router, name)

    def logits_LTE(self) -> torch.Tensor:
        """Router logits of the last forward, float32 `[L, T, E]`, differentiable."""
        device_type = self._routers[0].weight.device.type
        with torch.autocast(device_type, enabled=False):
            return torch.stack(
                [F.linear(r.tapped_input_TD.float(), r.weight.float()) for r in self._routers]
            )

    def expert_ids_LTK(self) -> torch.Tensor:
        """Chosen experts of the last forward, int64 `[L, T, K]`."""
        return torch.stack([router.tapped_ids_TK for router in self._routers])


def _remember(router: nn.Module, inputs: tuple[torch.Tensor], outputs: tuple[Any, ...]) -> None:
    router.tapped_input_TD = inputs[0].flatten(0, -2)
    router.tapped_ids_TK = outputs[2].detach()


def expert_share_LE(expert_ids_LTK: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    """Share of a layer's slots that each expert gets, float32 `[L, E]`, rows sum to 1.

    Axes between the first and the last may be any number of token axes.
    """
    ids_LX = expert_ids_LTK.flatten(1)
    counts_LE = torch.zeros(len(ids_LX), num_experts, device=ids_LX.device)
    counts_LE.scatter_add_(1, ids_LX, torch.ones_like(ids_LX, dtype=torch.float32))
    return counts_LE / ids_LX.shape[1]
