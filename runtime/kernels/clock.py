"""Stamps of the device's clock inside a captured step: how long is the link idle, how fast is it.

Four launches a step, in one layer: when its prefetches are decided and their copies may begin,
when its experts have computed, when the copies are done, and when the main stream would need them.
The first also adds up what the last step's four have shown. CUDA only: Triton's interpreter has no
clock.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

STARTED, COMPUTED, COPIED, ARRIVED = range(4)
"""Moments; their places hold the latest ones, 0 = not yet."""
NEURONS, WAITED, LEAST_WINDOW_NS, LEAST_REST_NS, COPYING_NS, COPIED_NEURONS, LATE_NS, SAMPLES = (
    range(4, 12)
)
"""What else `stamp` keeps: how much is copied between the latest moments, and whether that waited
for the experts; then, of all samples, the least from start to arrival where nothing waited, the
least from the experts' end to arrival, and sums of what copied anything: how long, how much, and
how long the main stream had to wait for it."""
NUM_PLACES = 12
UNSEEN_NS = 1 << 62  # of either least, before the first sample


@triton.jit
def _stamp(clock_X, allowance_2, left_1, waits_1, MOMENT: tl.constexpr):
    if MOMENT == 0:
        started, computed = tl.load(clock_X), tl.load(clock_X + 1)
        copied, arrived = tl.load(clock_X + 2), tl.load(clock_X + 3)
        neurons, waited = tl.load(clock_X + 4), tl.load(clock_X + 5)
        whole = (started > 0) & (computed > 0) & (copied > started)
        if whole & (arrived > started) & (arrived > computed):
            if waited == 0:
                tl.store(clock_X + 6, tl.minimum(tl.load(clock_X + 6), arrived - started))
            tl.store(clock_X + 7, tl.minimum(tl.load(clock_X + 7), arrived - computed))
            tl.store(clock_X + 11, tl.load(clock_X + 11) + 1)
            if neurons > 0:
                began = tl.where(waited == 1, computed, started)
                tl.store(clock_X + 8, tl.load(clock_X + 8) + copied - began)
                tl.store(clock_X + 9, tl.load(clock_X + 9) + neurons)
                late = tl.maximum(copied - arrived, 0)
                tl.store(clock_X + 10, tl.load(clock_X + 10) + late)
        waits = tl.load(waits_1)
        used = tl.load(allowance_2 + (1 - waits)) - tl.load(left_1)
        tl.store(clock_X + 4, used.to(tl.int64))
        tl.store(clock_X + 5, waits.to(tl.int64))
    tl.store(clock_X + MOMENT, globaltimer())


def new_clock(device: torch.device) -> Tensor:
    """int64: what `stamp` writes to, without samples."""
    clock_X = torch.zeros(NUM_PLACES, dtype=torch.int64, device=device)
    clock_X[LEAST_WINDOW_NS : LEAST_REST_NS + 1] = UNSEEN_NS
    return clock_X


def forget_samples(clock_X: Tensor) -> None:
    """Begin anew, without a wait for the device."""
    clock_X[LEAST_WINDOW_NS : LEAST_REST_NS + 1].fill_(UNSEEN_NS)
    clock_X[COPYING_NS:].zero_()


def stamp(
    clock_X: Tensor, moment: int, *, allowance_2: Tensor, left_1: Tensor, waits_1: Tensor
) -> None:
    """Note that it is ``moment`` now.

    Args:
        clock_X: From `new_clock`.
        moment: `STARTED`, `COMPUTED`, `COPIED` or `ARRIVED`.
        allowance_2: int32, neurons that could have been copied where copies wait for the experts,
            and where they do not; read at `STARTED`, as the next two.
        left_1: int32, those of them that are not.
        waits_1: int32, whether they wait.
    """
    _stamp[(1,)](clock_X, allowance_2, left_1, waits_1, MOMENT=moment, num_warps=1)
