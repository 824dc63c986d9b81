"""FineMoE's prefetch queue: what is likely and near comes first, as scores for a prefetcher.

A queue of experts of several layers is served in the order of p / (l - l_now). A prefetcher that
looks at several layers at once takes the highest scores first, so that order is a matter of what
its source says: `NearestLikeliest` divides another source's probabilities by the distance. What is
missed is read before any prefetch is given the link (`runtime.prefetch.prefetcher`), which is the
paper's pause.

Source: FineMoE §4.5. Deviations: the queue is made anew at each layer, from what is said by then,
instead of kept with the priorities of when it was filled; and scores below what a prefetcher asks
of a probability do not come, however empty the link is.

Shape letters: H layers ahead · E experts per layer.
"""

import torch
from torch import Tensor

from runtime.prefetch.sources import Now, Source


class NearestLikeliest:
    """A `Source` that orders another one's candidates as FineMoE's queue.

    Args:
        source: Who says how likely experts are; probabilities in [0, 1].
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def next_HE(self, layers: range, now: Now) -> Tensor | None:
        """As `Source.next_HE`: p / (l - l_now); before layer 0, l_now is -1."""
        next_HE = self._source.next_HE(layers, now)
        return None if next_HE is None else queue_priority(next_HE, layers, now.layer)


def queue_priority(next_HE: Tensor, layers: range, now_layer: int) -> Tensor:
    """P / (l - l_now), float32 [H, E]; the higher, the sooner.

    Args:
        next_HE: float32, probabilities.
        layers: Whose rows they are, all after ``now_layer``.
        now_layer: The layer that computes now; -1 before layer 0.

    Raises:
        ValueError: A layer has been already.
    """
    if layers.start <= now_layer:
        raise ValueError(f"layers={layers} with now_layer={now_layer}: must come after it")
    # Made on the device, not copied there: a captured step takes nothing from the host.
    distance_H = torch.arange(
        layers.start - now_layer, layers.stop - now_layer, device=next_HE.device
    )
    return next_HE / distance_H[:, None]
