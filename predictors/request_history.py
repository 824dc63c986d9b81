"""What finished requests used: the memory that outlives a request, owned by the caller.

A `State` is one request's past. Some predictors (`predictors.task`) forecast a request from the
requests before it; they read a `RequestHistory`, given by `Predictor.with_history`. Whoever runs or
replays requests owns it, and adds a request only once it is finished: so a forecast cannot depend
on a request that is still running, and two owners never share a past.

Knows nothing of predictors, and nothing of what a request was about.

Shape letters: L MoE layers · E experts per layer · N finished requests.
"""

from collections import deque

import torch
from torch import Tensor

from data.schema import Trace
from predictors.lessons import AtOnce, Lessons
from predictors.routing import request_use_LE


class RequestHistory:
    """Expert use of the requests that have finished, in the order in which they did.

    Args:
        capacity: Only so many of the latest are kept.
        lessons: When who reads it learns from it.

    Attributes:
        lessons: As given.
        num_finished: Requests added so far, kept or not.
    """

    def __init__(self, *, capacity: int = 256, lessons: Lessons | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be at least 1")
        self.capacity = capacity
        self.lessons = lessons or AtOnce()
        self.num_finished = 0
        self._kept: deque[Tensor] = deque(maxlen=capacity)

    def add(self, use_LE: Tensor) -> None:
        """A request has finished.

        Args:
            use_LE: float32, the share of its tokens that used each expert.

        Raises:
            ValueError: Its shape is not that of the others, or a share is not in [0, 1].
        """
        if use_LE.ndim != 2 or (self._kept and use_LE.shape != self._kept[0].shape):
            known = tuple(self._kept[0].shape) if self._kept else "[L, E]"
            raise ValueError(f"a request's use of shape {tuple(use_LE.shape)}: must be {known}")
        if not bool(((use_LE >= 0) & (use_LE <= 1)).all()):  # NaN is neither
            raise ValueError("a request's use of an expert must be a share in [0, 1]")
        self._kept.append(use_LE.float())
        self.num_finished += 1

    def add_trace(self, trace: Trace, num_experts: int) -> None:
        """A recorded request has finished; one that routed nothing leaves nothing to remember."""
        if trace.num_tokens:
            self.add(torch.from_numpy(request_use_LE(trace, num_experts)))

    def before(self, request: int, num: int) -> list[Tensor]:
        """Use of up to ``num`` requests right before the one numbered ``request``, oldest first.

        Args:
            request: 0 is the first that was ever added, `num_finished` the next one.
            num: How many at most; fewer where there were none yet, or where `capacity` dropped
                them.
        """
        first_kept = self.num_finished - len(self._kept)
        start, stop = max(first_kept, request - num), min(request, self.num_finished)
        return [self._kept[i - first_kept] for i in range(start, stop)]


def last_call(request: int, period: int) -> int:
    """How many requests had finished when the forecast that is in force for ``request`` was made.

    Calls happen once the first request has finished, and every ``period`` requests from there on.
    """
    return 0 if request == 0 else 1 + (request - 1) // period * period
