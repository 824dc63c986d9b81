"""What a division of memory reckons with, counted by the device while it serves.

The same counts as `runtime.split_budget.SplitStatistics` makes on a host, of all layers at once
after each token, inside a captured step: fixed shapes, no waiting. Only passes of one token count,
as the model is of one request.

Shape letters: L MoE layers · E experts per layer · R ranks by priority · Y places in the predicted
order; both are E.
"""

import torch
from torch import Tensor

from runtime.split_budget import LayerStatistics, shares_of_counts


class SplitCounts:
    """Counts since the last `reset`.

    Args:
        num_layers: L.
        num_experts: E.
        top_k: K.
        device: Where.
        with_guesses: Somebody prefetches, and writes what it goes by into `said_LE`.

    Attributes:
        said_LE: float32, the higher, the sooner it would be prefetched; None without guesses.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        device: torch.device,
        with_guesses: bool,
    ) -> None:
        L, E = num_layers, num_experts

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._top_k = top_k
        self._tokens_1, self._used_LR, self._right_LY = zeros(1), zeros(L, E), zeros(L, E)
        self._rank_LYR = zeros(L, E, E) if with_guesses else None
        self.said_LE = torch.zeros(L, E, device=device) if with_guesses else None
        self._ranks_LE = torch.arange(E, device=device).expand(L, E).contiguous()

    def add(self, keep_LE: Tensor, needed_LE: Tensor) -> None:
        """Count one token.

        Args:
            keep_LE: float32, the policy's scores before it.
            needed_LE: bool, what it has used.
        """
        order_LR = keep_LE.argsort(dim=-1, descending=True, stable=True)
        self._tokens_1.add_(1)
        self._used_LR.add_(needed_LE.gather(1, order_LR))
        if self.said_LE is None or self._rank_LYR is None:
            return
        rank_LE = torch.empty_like(order_LR).scatter_(1, order_LR, self._ranks_LE)
        order_LY = self.said_LE.argsort(dim=-1, descending=True, stable=True)
        comes_LY = self.said_LE.gather(1, order_LY) > 0  # nobody fetches what is not expected
        self._right_LY.add_(needed_LE.gather(1, order_LY) & comes_LY)
        at_LY1 = rank_LE.gather(1, order_LY)[..., None]  # each place has a row of its own
        self._rank_LYR.scatter_add_(2, at_LY1, torch.ones_like(at_LY1))

    @property
    def num_tokens(self) -> int:
        """That were counted; waits for the device."""
        return int(self._tokens_1)

    def layers(self) -> list[LayerStatistics]:
        """Shares instead of counts; waits for the device.

        Without guesses none is right, so that prefetching is worth nothing.

        Raises:
            ValueError: No token was counted.
        """
        rank_LYR = self._rank_LYR
        if rank_LYR is None:
            rank_LYR = self._used_LR[:, None].expand(-1, self._used_LR.shape[1], -1) * 0
        counts = (self._used_LR, self._right_LY, rank_LYR)
        return shares_of_counts(
            *(count.double().cpu().numpy() for count in counts),
            tokens_L=self._tokens_1.double().expand(len(self._used_LR)).cpu().numpy(),
            top_k=self._top_k,
        )

    def reset(self) -> None:
        """Begin anew, in place."""
        for tensor in (self._tokens_1, self._used_LR, self._right_LY):
            tensor.zero_()
        if self._rank_LYR is not None:
            self._rank_LYR.zero_()
