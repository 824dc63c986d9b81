"""Stamps of the device's clock inside a captured step: how long is the link idle, how fast is it.

Three launches a step, in one layer: when its prefetches are decided and their copies begin, when
the copies are done, and when the main stream would need them. The first also adds up what the last
step's three have shown. CUDA only: Triton's interpreter has no clock.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

STARTED, COPIED, ARRIVED = range(3)
NEURONS, LEAST_WINDOW_NS, COPYING_NS, COPIED_NEURONS, LATE_NS, SAMPLES = range(3, 9)
"""What `stamp` keeps, places of its tensor: the latest three moments (0 = not yet) and what is
copied between them; then, of all samples, the least from start to arrival, and sums of what copied
anything: how long, how much, and how long the main stream had to wait for it."""
NUM_PLACES = 9
UNSEEN_NS = 1 << 62  # `LEAST_WINDOW_NS` before the first sample


@triton.jit
def _stamp(clock_X, allowance_1, left_1, MOMENT: tl.constexpr):
    if MOMENT == 0:
        started, copied, arrived = tl.load(clock_X), tl.load(clock_X + 1), tl.load(clock_X + 2)
        neurons = tl.load(clock_X + 3)
        if (started > 0) & (copied > started) & (arrived > started):
            window = arrived - started
            tl.store(clock_X + 4, tl.minimum(tl.load(clock_X + 4), window))
            tl.store(clock_X + 8, tl.load(clock_X + 8) + 1)
            if neurons > 0:
                tl.store(clock_X + 5, tl.load(clock_X + 5) + copied - started)
                tl.store(clock_X + 6, tl.load(clock_X + 6) + neurons)
                late = tl.maximum(copied - arrived, 0)
                tl.store(clock_X + 7, tl.load(clock_X + 7) + late)
        used = tl.load(allowance_1) - tl.load(left_1)
        tl.store(clock_X + 3, used.to(tl.int64))
    tl.store(clock_X + MOMENT, globaltimer())


def new_clock(device: torch.device) -> Tensor:
    """int64: what `stamp` writes to, without samples."""
    clock_X = torch.zeros(NUM_PLACES, dtype=torch.int64, device=device)
    clock_X[LEAST_WINDOW_NS] = UNSEEN_NS
    return clock_X


def forget_samples(clock_X: Tensor) -> None:
    """Begin anew, without a wait for the device."""
    clock_X[LEAST_WINDOW_NS:].zero_()
    clock_X[LEAST_WINDOW_NS : LEAST_WINDOW_NS + 1].fill_(UNSEEN_NS)


def stamp(clock_X: Tensor, moment: int, *, allowance_1: Tensor, left_1: Tensor) -> None:
    """Note that it is ``moment`` now.

    Args:
        clock_X: From `new_clock`.
        moment: `STARTED`, `COPIED` or `ARRIVED`.
        allowance_1: int32, neurons that could have been copied; read at `STARTED`, as the next.
        left_1: int32, those of them that are not.
    """
    _stamp[(1,)](clock_X, allowance_1, left_1, MOMENT=moment, num_warps=1)
