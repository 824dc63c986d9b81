"""Lets a planner change, request by request, who is resident in a model that is served lossily.

Residents change where requests begin while none runs, and never within one. Who serves batches must
therefore let all that run end now and then (`GenerationEngine(group_requests=...)`); those that
begin together are decided for together. A planner learns only from requests that ran alone: in a
batch, nobody says whose use it was.

Knows nothing of Eq. 2 (`runtime.resident_planner`), nor of how experts move or routers are bound.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from runtime.backend import OffloadStats
from runtime.observed_request import PassRow
from runtime.resident_planner import Queued, ResidentPlanner

logger = logging.getLogger(__name__)

# Of at most so many prompts, in the order in which they will begin: text and tokens.
Waiting = Callable[[int], Sequence[tuple[str, int]]]


class ServedResidents:
    """Follows announced sequences (`Offload.announce`).

    Args:
        planner: Decides.
        keep_resident: Makes bool [L, E] experts resident.
        take_use: What was routed since it was last asked, or None (`ResidentRouting.take_use`).
        waiting: The next prompts in the queue.
    """

    def __init__(
        self,
        planner: ResidentPlanner,
        *,
        keep_resident: Callable[[Tensor], None],
        take_use: Callable[[], Tensor | None],
        waiting: Waiting,
    ) -> None:
        self._planner = planner
        self._keep_resident, self._take_use, self._waiting = keep_resident, take_use, waiting
        self._running: dict[str, int] = {}  # the task of each
        self._is_mixed = False
        self._requests_of_task: Counter[str] = Counter(dict.fromkeys(planner.profile.tasks, 0))
        keep_resident(planner.resident_LE)

    def announce(self, rows: Sequence[PassRow]) -> None:
        """The next pass is of these; those that nobody has seen begin."""
        # A prompt without text is the server's own, to see that the model runs.
        new = [row for row in rows if row.key not in self._running and row.prompt]
        if not new:
            return
        profile = self._planner.profile
        queued = [Queued(profile.reader.read(row.prompt or ""), len(row.prompt_ids)) for row in new]
        self._is_mixed = bool(self._running) or len(new) > 1
        if not self._running:
            self._take_use()  # of nobody's tokens
            if self._planner.is_due:
                self._plan(queued)
        for row, one in zip(new, queued, strict=True):
            self._planner.begin()
            self._running[row.key] = one.task
            self._requests_of_task[profile.tasks[one.task]] += 1

    def end_request(self, key: str, *, remember: bool) -> None:
        """A sequence is over; unknown ones are no matter."""
        task = self._running.pop(key, None)
        if task is None:
            return
        use_LE = self._take_use()
        if remember and use_LE is not None and not self._is_mixed:
            self._planner.finished(task, use_LE)
        self._is_mixed = bool(self._running)

    def add_to(self, stats: OffloadStats) -> OffloadStats:
        """The same figures, with those of the decisions."""
        return dataclasses.replace(
            stats,
            resident_plans=self._planner.num_plans,
            layers_changed=self._planner.layers_changed,
            layers_kept=self._planner.layers_kept,
            requests_of_task=dict(self._requests_of_task),
        )

    def _plan(self, beginning: Sequence[Queued]) -> None:
        profile, changed = self._planner.profile, self._planner.layers_changed
        limit = max(0, self._planner.period - len(beginning))
        waiting = [
            Queued(profile.reader.read(prompt), num_tokens)
            for prompt, num_tokens in self._waiting(limit)
        ]
        queue = [*beginning, *waiting]
        self._keep_resident(self._planner.plan(queue))
        logger.debug(
            "Residents for %d requests of %s: %d layers changed",
            len(queue),
            sorted({profile.tasks[queued.task] for queued in queue}),
            self._planner.layers_changed - changed,
        )
