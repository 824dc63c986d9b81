"""What training asks of the routers: no dead expert, and routing that is worth predicting.

Two losses pull at each router, and a controller per loss and layer keeps its coefficient only as
large as a stated target needs; the second loss, locality, can be left out. Letters: B sequences, T
tokens, L layers, E experts, K experts per token, N passages. Knows logits and chosen experts, not
the model.
"""

from dataclasses import dataclass

import torch

from data.tiny_moe.routing import expert_share_LE

USUAL_BALANCE_COEF = 0.01
"""Coefficient of load balancing in ordinary training (Switch Transformer §2.2; OLMoE too)."""


@dataclass(frozen=True, kw_only=True)
class RouterTargets:
    """What each layer's routing should come to.

    Attributes:
        min_share: The least used expert's share of the slots, as a multiple of an even share.
        previous_token_recall: Share of a token's experts that the token before it used too. Real
            models have 0.43 (gpt-oss-20b) and 0.29 (DeepSeek-V2-Lite architecture). None leaves
            the locality loss out, as ordinary training does.
        chunk: Tokens in a passage, over which usage should be concentrated.
        least_balance_coef: The load-balancing coefficient does not fall below this. In the first
            hundreds of steps all experts are used, and a coefficient that falls to nothing then
            has to climb back while experts die.
        z_coef: Coefficient of the router z-loss (ST-MoE §3.2), which keeps logits small.
    """

    min_share: float = 0.4
    previous_token_recall: float | None = 0.38
    chunk: int = 64
    least_balance_coef: float = 1e-4
    z_coef: float = 1e-3


class Controller:
    """Loss coefficients, one per layer: raised while a measurement is below target, else lowered.

    The logarithm moves with the relative distance from the target; no host synchronisation.
    """

    def __init__(
        self, coef_L: torch.Tensor, *, target: float, least: float, most: float, rate: float = 0.01
    ) -> None:
        """Start from `coef_L`; `rate` is the largest change of the logarithm per step."""
        self.coef_L = coef_L
        self._target, self._least, self._most, self._rate = target, least, most, rate

    def update(self, measured_L: torch.Tensor) -> torch.Tensor:
        """Take the latest measurement and return the coefficients to use, `[L]`."""
        error_L = ((self._target - measured_L) / self._target).clamp(-1, 1)
        self.coef_L = (self.coef_L * (self._rate * error_L).exp()).clamp(self._least, self._most)
        return self.coef_L


class RouterLoss:
    """The routers' part of the training loss, with the running means it steers by.

    Attributes:
        share_LE: Running mean of each expert's share of its layer's slots.
        recall_L: Running mean of the previous-token recall.
        balance: Controller of the load-balancing loss.
        locality: Controller of the locality loss; None without that loss.
    """

    def __init__(
        self, *, num_layers: int, num_experts: int, device: torch.device, targets: RouterTargets
    ) -> None:
        """Start with strong balancing, a weak pull to locality, and no expert used yet."""
        self.share_LE = torch.zeros(num_layers, num_experts, device=device)
        self.recall_L = torch.zeros(num_layers, device=device)
        ones_L = torch.ones(num_layers, device=device)
        self.balance = Controller(
            0.05 * ones_L, target=targets.min_share, least=targets.least_balance_coef, most=0.1
        )
        self.locality: Controller | None = None
        if targets.previous_token_recall is not None:
            self.locality = Controller(
                1e-3 * ones_L, target=targets.previous_token_recall, least=1e-4, most=0.1
            )
        self._targets = targets

    def __call__(self, logits_LTE: torch.Tensor, expert_ids_LBTK: torch.Tensor) -> torch.Tensor:
        """Loss of one batch, a scalar summed over layers; updates means and coefficients.

        Args:
            logits_LTE: Router logits, float32, `T` running over the whole batch.
            expert_ids_LBTK: Chosen experts, the same tokens by sequence.
        """
        num_experts = logits_LTE.shape[-1]
        probs_LTE = logits_LTE.softmax(-1)
        share_LE = expert_share_LE(expert_ids_LBTK, num_experts=num_experts)
        self.share_LE = self.share_LE.lerp(share_LE, 0.02)
        self.recall_L = self.recall_L.lerp(previous_token_recall_L(expert_ids_LBTK), 0.02)
        balance_coef_L = self.balance.update(self.share_LE.amin(-1) * num_experts)
        loss_L = balance_coef_L * balance_loss_L(probs_LTE, share_LE)
        if self.locality is not None:
            locality_coef_L = self.locality.update(self.recall_L)
            locality_L = locality_loss_L(probs_LTE, chunk=self._targets.chunk)
            loss_L = loss_L + locality_coef_L * locality_L
        loss_L = loss_L + self._targets.z_coef * logits_LTE.logsumexp(-1).square().mean(-1)
        return loss_L.sum()

    def summary(self) -> dict[str, float]:
        """Means over layers for a log line; the least share is that of the worst layer."""
        summary = {
            "min_share_of_even": self.share_LE.min().item() * self.share_LE.shape[-1],
            "previous_token_recall": self.recall_L.mean().item(),
            "balance_coef": self.balance.coef_L.mean().item(),
        }
        if self.locality is not None:
            summary["locality_coef"] = self.locality.coef_L.mean().item()
        return summary


def previous_token_recall_L(expert_ids_LBTK: torch.Tensor) -> torch.Tensor:
    """Share of a token's experts that the token before it used too, float32 `[L]`."""
    now, before = expert_ids_LBTK[:, :, 1:, :, None], expert_ids_LBTK[:, :, :-1, None, :]
    return (now == before).any(-1).float().mean((1, 2, 3))


def balance_loss_L(probs_LTE: torch.Tensor, share_LE: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of each layer over the batch, `[L]`; 1 when even.

    E · Σₑ share·probability (Switch Transformer, Eqs 4-6). The loss built into transformers pools
    all layers, where a dead expert of one can be made up for by a busy one of another; this one
    does not.
    """
    return share_LE.shape[-1] * (share_LE * probs_LTE.mean(1)).sum(-1)


def locality_loss_L(probs_LTE: torch.Tensor, *, chunk: int) -> torch.Tensor:
    """Entropy of expert usage within runs of `chunk` tokens, mean over runs, nats `[L]`.

    Low entropy within passages beside a load that is even over all of them is a high mutual
    information between passage and expert (Mod-Squad §3.2, whose tasks are passages here).
    """
    layers, _, experts = probs_LTE.shape
    usage_LNE = probs_LTE.view(layers, -1, chunk, experts).mean(2)
    entropy_LN: torch.Tensor = torch.special.entr(usage_LNE).sum(-1)
    return entropy_LN.mean(-1)
