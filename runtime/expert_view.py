"""What can be seen of a backend's experts between two passes, and the counting that it needs.

For people who watch a server (`runtime.server.dashboard`): who is resident, whom the cache is told
to expect, who was found and who was missed since the last look. A view is a copy on the host that
nobody writes to any more, so it may go to any thread; it is *taken* on the thread that runs the
model, where no step is half done. Nothing is counted for it while nobody looks.

Knows nothing of devices, policies or servers.

Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.cache import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertView:
    """The experts at one moment; all tensors [L, E], on the host.

    Attributes:
        resident_LE: bool, who is in a slot.
        expected_LE: float32, the later use that the cache goes by; None where it reads no forecast.
        hits_LE: int64, how often each was needed and found since the last view; None from a backend
            that counts by layer alone.
        misses_LE: int64, how often each was needed and not found.
    """

    resident_LE: Tensor
    expected_LE: Tensor | None
    hits_LE: Tensor | None = None
    misses_LE: Tensor | None = None

    def most_expected_LE(self, top_k: int) -> Tensor:
        """Mark the K that are expected most in each layer, bool [L, E]; none where nothing is."""
        marked_LE = torch.zeros_like(self.resident_LE)
        if self.expected_LE is None:
            return marked_LE
        most_LK = self.expected_LE.topk(top_k).indices
        return marked_LE.scatter_(-1, most_LK, True) & (self.expected_LE > 0)


class UseCounts:
    """How often each expert was found and missed between two looks.

    Args:
        num_layers: L.
        num_experts: E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._hits_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._misses_LE = torch.zeros_like(self._hits_LE)

    def add(self, step: Step, layer: int) -> None:
        """Count one event of one layer."""
        self._hits_LE[layer] += step.hit_LE
        self._misses_LE[layer] += step.insert_LE | step.streamed_LE

    def take(self) -> tuple[Tensor, Tensor]:
        """Hits and misses since the last call, int64 [L, E] each; both begin at 0 again."""
        taken = self._hits_LE, self._misses_LE
        self._hits_LE, self._misses_LE = (torch.zeros_like(counts_LE) for counts_LE in taken)
        return taken


def slot_recall(probs_LE: Tensor, next_LE: Tensor, top_k: int) -> tuple[int, int]:
    """Slot recall@K of one token (`predictors.metrics`), as a fraction's two parts.

    Args:
        probs_LE: Its routers' probabilities; it used the K highest of each layer.
        next_LE: What was forecast of it before it was routed. Layers of which nothing was said
            (all 0) do not count.
        top_k: K.

    Returns:
        How many of the experts that it used stood among the K forecast highest, and how many it
        used.
    """
    said_L = next_LE.amax(-1) > 0
    used_LK, guessed_LK = probs_LE.topk(top_k).indices, next_LE.topk(top_k).indices
    is_guess_LE = torch.zeros_like(next_LE, dtype=torch.bool).scatter_(-1, guessed_LK, True)
    found_L = is_guess_LE.gather(-1, used_LK).sum(-1)
    return int(found_L[said_L].sum()), int(said_L.sum()) * top_k
