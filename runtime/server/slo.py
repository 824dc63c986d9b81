"""Our scheduler that keeps objectives, within transformers' continuous batching.

Whenever a sequence has come or gone it asks `runtime.server.objectives.Objectives` who may enter;
who was let in stays so, also where the pages that it holds are taken again. All else (pages,
prompts in pieces, who is starved of pages) is the first-in first-out scheduler's that it derives
from.

Knows nothing of objectives, times or costs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

SLO = "slo"

DecideFn = Callable[[Mapping[str, int], Sequence[str]], Sequence[str]]


class SloBatchScheduler(FIFOScheduler):  # type: ignore[misc]
    """Made by transformers, told whom to ask by `use_decisions`."""

    def reset(self) -> None:
        """As the base class, which calls it when it is made, too."""
        super().reset()
        self._known: set[str] = set()  # who was here when it was last decided
        self._let_in: list[str] = []

    def use_decisions(self, decide: DecideFn) -> None:
        """Ask this from now on; until then it is first in, first out.

        Args:
            decide: Given the tokens that each sequence which was let in has to read yet, by its
                name, and the names of the others; returns whom of these to let in, in this order.
        """
        self._decide = decide

    def _get_waiting_candidates(self) -> list[Any]:
        waiting = {state.request_id: state for state in super()._get_waiting_candidates()}
        decide: DecideFn | None = getattr(self, "_decide", None)
        if decide is None or not waiting:
            return list(waiting.values())
        known = {*self.active_requests, *waiting}
        self._let_in = [name for name in self._let_in if name in known]
        is_idle = not self.active_requests and not any(name in waiting for name in self._let_in)
        if known != self._known or is_idle:
            self._known = known
            let_in = set(self._let_in)
            unread = {
                name: len(state.remaining_prefill_tokens)
                for name, state in {**self.active_requests, **waiting}.items()
                if name in let_in
            }
            self._let_in += decide(unread, [name for name in waiting if name not in let_in])
        return [waiting[name] for name in self._let_in if name in waiting]


def register() -> None:
    """Make the scheduler known to transformers under the name `SLO`."""
    SCHEDULER_MAPPING[SLO] = SloBatchScheduler
