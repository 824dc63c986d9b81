"""Lossy routing: tokens go to the best experts that are resident, and no others (eMoE §3.2.2).

Off unless asked for (``attach(mode="resident_only")``): what a model says then is no longer what it
would say with all of its experts. Nothing is loaded within a forward pass; which experts are
resident changes between requests alone.

The paper ranks the router's scores and takes the best K of those that are resident. Whether weights
are renormalised over them it does not say; here the model's own rule is followed, as if absent
experts had a logit of minus infinity: probabilities of the resident ones sum to 1, the K largest
are taken, and divided by their sum where the router does so. Whether it does is found by running
it; routers that weigh experts in any other way (groups, selection biases, scaled weights) are
refused by name. Fewer than K resident experts, of which the paper would use all, are refused too.

Knows nothing of who decides what is resident, or of how it gets there.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · D hidden.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from data.adapters import MoELayer, router_probs_TE
from data.schema import MoESpec
from runtime.backend import OffloadStats

_TRIED_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def choose_resident(
    moe: MoELayer, logits_TE: Tensor, resident_E: Tensor, *, top_k: int, is_normalised: bool
) -> tuple[Tensor, Tensor]:
    """The best resident experts of each token.

    Args:
        moe: The layer.
        logits_TE: The router's, of all experts.
        resident_E: bool, at least K of them.
        top_k: K.
        is_normalised: Whether a token's weights sum to 1.

    Returns:
        float32 weights [T, K], largest first, and int64 ids [T, K].
    """
    probs_TE = router_probs_TE(moe, logits_TE).masked_fill(~resident_E, 0.0)
    probs_TE /= probs_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # Where probabilities are 0 in float32, a resident expert still comes before an absent one.
    ids_TK = probs_TE.masked_fill(~resident_E, -1.0).topk(top_k, dim=-1).indices
    weights_TK = probs_TE.gather(-1, ids_TK)
    if is_normalised:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, ids_TK


def most_wanted(scores_LE: Tensor, slots: Sequence[int]) -> Tensor:
    """The experts of each layer that score highest, as many as it has slots; of equals the first.

    Args:
        scores_LE: float.
        slots: C of each layer.

    Returns:
        bool [L, E].
    """
    wanted_LE = torch.zeros(scores_LE.shape, dtype=torch.bool)
    order_LE = scores_LE.argsort(dim=-1, descending=True, stable=True)
    for layer, num_slots in enumerate(slots):
        wanted_LE[layer, order_LE[layer, :num_slots]] = True
    return wanted_LE


class ResidentRouting:
    """Restricts a model's routers until `remove`; all experts are allowed until `allow`.

    Args:
        layers: The model's MoE layers.
        spec: Its MoE.

    Attributes:
        routed: (token, expert) pairs that were routed.
        rerouted: Those of them whose expert the router would not have chosen.

    Raises:
        ValueError: The routers choose by another rule than this class knows.
    """

    def __init__(self, *, layers: Sequence[MoELayer], spec: MoESpec) -> None:
        self.routed = self.rerouted = 0
        self._top_k = spec.top_k
        self._wanted_LE = torch.zeros(spec.num_layers, spec.num_experts)
        self._resident_LE = torch.ones(spec.num_layers, spec.num_experts, dtype=torch.bool)
        self._is_normalised = _is_normalised(layers[0], top_k=spec.top_k)
        self._handles: list[RemovableHandle] = [
            moe.router.register_forward_hook(self._hook(moe)) for moe in layers
        ]

    def allow(self, resident_LE: Tensor) -> None:
        """Route to these experts from now on.

        Args:
            resident_LE: bool, at least K of each layer.

        Raises:
            ValueError: It has another shape, or fewer.
        """
        if resident_LE.shape != self._resident_LE.shape:
            raise ValueError(
                f"resident experts of shape {list(resident_LE.shape)}: "
                f"the model has {list(self._resident_LE.shape)}"
            )
        fewest = int(resident_LE.sum(dim=-1).min())
        if fewest < self._top_k:
            raise ValueError(
                f"{fewest} resident experts in a layer: each token needs top_k={self._top_k}"
            )
        self._resident_LE = resident_LE.clone()

    def take_use(self) -> Tensor | None:
        """What the routers would have chosen freely since this was last asked.

        Of the tokens as they were computed: what they would have wanted after layers that are not
        restricted, nobody knows.

        Returns:
            float32 [L, E], the share of the tokens that wanted each expert; None without any.
        """
        wanted_LE, self._wanted_LE = self._wanted_LE, torch.zeros_like(self._wanted_LE)
        num_tokens = float(wanted_LE[0].sum()) / self._top_k
        return wanted_LE / num_tokens if num_tokens else None

    def add_to(self, stats: OffloadStats) -> OffloadStats:
        """The same figures, with those of the routing."""
        return dataclasses.replace(
            stats, mode="resident_only", routed=self.routed, rerouted=self.rerouted
        )

    def remove(self) -> None:
        """Let the routers choose again; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, moe: MoELayer) -> Any:
        def restrict(router: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits, weights, ids = output
            resident_E = self._resident_LE[moe.layer]
            is_absent = ~resident_E[ids]
            self.routed += ids.numel()
            self._wanted_LE[moe.layer] += ids.flatten().bincount(minlength=len(resident_E))
            if not is_absent.any():
                return output  # to the bit what the model would do
            self.rerouted += int(is_absent.sum())
            logits_TE = logits.reshape(-1, logits.shape[-1])
            weights_TK, ids_TK = choose_resident(
                moe,
                logits_TE,
                resident_E,
                top_k=self._top_k,
                is_normalised=self._is_normalised,
            )
            return logits, weights_TK.to(weights.dtype).view_as(weights), ids_TK.view_as(ids)

        return restrict


@torch.no_grad()
def _is_normalised(moe: MoELayer, *, top_k: int) -> bool:
    """Whether a router's weights sum to 1; ValueError if probabilities alone do not decide them."""
    parameter = next(moe.router.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(_TRIED_TOKENS, moe.hidden_size, generator=generator)
    logits, weights, _ = moe.router.forward(hidden_TD.to(parameter))  # past anybody's hooks
    logits_TE = logits.reshape(_TRIED_TOKENS, -1)
    everyone_E = torch.ones(logits_TE.shape[-1], dtype=torch.bool)
    tolerance = _TOLERANCE[parameter.dtype]
    own_TK = weights.reshape(_TRIED_TOKENS, -1).float().sort(descending=True).values
    for is_normalised in (True, False):
        weights_TK, _ = choose_resident(
            moe, logits_TE, everyone_E, top_k=top_k, is_normalised=is_normalised
        )
        if own_TK.shape == weights_TK.shape and torch.allclose(
            own_TK, weights_TK, rtol=tolerance, atol=tolerance
        ):
            return is_normalised
    raise ValueError(
        f"mode='resident_only': {type(moe.router).__name__} does not weigh its top_k={top_k} by "
        "their probabilities alone; only routers that do can be restricted"
    )
