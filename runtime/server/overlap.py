"""Our scheduler: those run together who are forecast to need the same experts.

A batch reads every expert that any of its tokens needs, so what it costs is the number of distinct
experts. Given for each sequence the probabilities that its next token uses each expert, tokens of a
batch drawn independently need

    sum over layers and experts of 1 - product over the batch of (1 - p)

distinct experts. Whenever there is a place, the waiting sequence that adds least to that number
gets it; those of whom nothing is forecast, and ties, go by order of arrival.

Nobody starves: who was overtaken by ``max_overtaken`` later arrivals is next, oldest first (several
that enter at once may all overtake, so the most is that and the places of a batch).

`order` is the decision alone, which `benchmarks.batch_scheduling` measures on recorded traces.
`OverlapScheduler` puts it into transformers' continuous batching; all else (pages, prompts in
pieces, who is starved of pages) is the first-in first-out scheduler's that it derives from.

Knows nothing of predictors or text. Shape letters: L MoE layers · E experts per layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

OVERLAP = "moecast_overlap"
MAX_OVERTAKEN = 16

ForecastFn = Callable[[str], Tensor | None]


def order(
    waiting: Sequence[str],
    running: Sequence[str],
    forecast_of: ForecastFn,
    *,
    places: int,
    overtaken: Mapping[str, int],
    max_overtaken: int = MAX_OVERTAKEN,
) -> list[str]:
    """Who is to be taken first.

    Args:
        waiting: Names of those that wait, oldest first.
        running: Names of those that run, who keep their places.
        forecast_of: Probabilities that a sequence's next token uses each expert, [L, E]; or None.
        places: How many of those that wait can be taken; the order of the others is theirs.
        overtaken: By how many later arrivals each was overtaken so far.
        max_overtaken: Who was overtaken so often is not overtaken again.

    Returns:
        All of ``waiting``.
    """
    due = [name for name in waiting if overtaken.get(name, 0) >= max_overtaken]
    taken, left = due[:places], [name for name in waiting if name not in due]
    unused_LE: Tensor | None = None  # probability that nobody in the batch uses the expert
    for name in [*running, *taken]:
        if (use_LE := forecast_of(name)) is not None:
            unused_LE = (1.0 - use_LE) if unused_LE is None else unused_LE * (1.0 - use_LE)
    known = {name: use_LE for name in left if (use_LE := forecast_of(name)) is not None}
    while len(taken) < places and left:
        name = left[0]
        if unused_LE is not None and known:
            names = [candidate for candidate in left if candidate in known]
            if names:
                added = torch.stack([(known[n] * unused_LE).sum() for n in names])
                name = names[int(added.argmin())]  # of equals the first, which is the oldest
        left.remove(name)
        taken.append(name)
        if name in known:
            unused_LE = 1.0 - known[name] if unused_LE is None else unused_LE * (1.0 - known[name])
    return [*taken, *[name for name in waiting if name not in taken]]


class OverlapScheduler(FIFOScheduler):  # type: ignore[misc]
    """`order` among those that wait; made by transformers, told of forecasts by `use_forecasts`."""

    def reset(self) -> None:
        """As the base class, which calls it when it is made, too."""
        super().reset()
        self._overtaken: dict[str, int] = {}

    def use_forecasts(self, forecast_of: ForecastFn) -> None:
        """Ask this from now on; until then it is first in, first out."""
        self._forecast_of = forecast_of

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """As the base class; counts who was overtaken by whom."""
        before = list(self.waiting_requests_order)
        scheduled = super().schedule_batch(token_budget, cache_budget)
        waiting = set(self.waiting_requests_order)
        num_later = 0
        for name in reversed(before):
            if name not in waiting:
                num_later += 1
            elif num_later:
                self._overtaken[name] = self._overtaken.get(name, 0) + num_later
        # Nor are those kept who left otherwise: they were cancelled while they waited.
        self._overtaken = {n: count for n, count in self._overtaken.items() if n in waiting}
        return scheduled

    def _get_waiting_candidates(self) -> list[Any]:
        states = super()._get_waiting_candidates()
        places = self.max_requests_per_batch - len(self.active_requests)
        forecast_of: ForecastFn | None = getattr(self, "_forecast_of", None)
        if forecast_of is None or len(states) < 2 or places < 1:
            return list(states)
        by_name = {state.request_id: state for state in states}
        names = order(
            list(by_name),
            list(self.active_requests),
            forecast_of,
            places=places,
            overtaken=self._overtaken,
        )
        return [by_name[name] for name in names]


def register() -> None:
    """Make the scheduler known to transformers under the name `OVERLAP`."""
    SCHEDULER_MAPPING[OVERLAP] = OverlapScheduler
