"""Lets a planner change, request by request, who is resident in a model that is served lossily.

Residents change where a request begins, while none runs, and never within one: so sequences run one
after the other. Where several do run together, residents stay as they are, and nothing is learned
from what they use, since nobody can say whose use it was.

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
        for row in rows:
            # A prompt without text is the server's own, to see that the model runs.
            if row.key not in self._running and row.position == 0 and row.prompt:
                self._begin(row.key, row.prompt, len(row.prompt_ids))

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

    def _begin(self, key: str, prompt: str, num_tokens: int) -> None:
        planner = self._planner
        task = planner.profile.reader.read(prompt)
        self._requests_of_task[planner.profile.tasks[task]] += 1
        if self._running:
            self._is_mixed = True
        else:
            self._take_use()  # of nobody's tokens
            if planner.is_due:
                self._plan(Queued(task, num_tokens))
        planner.begin()
        self._running[key] = task

    def _plan(self, first: Queued) -> None:
        read = self._planner.profile.reader.read
        counting = self._waiting(self._planner.period - 1)
        waiting = [Queued(read(prompt), num_tokens) for prompt, num_tokens in counting]
        changed = self._planner.layers_changed
        self._keep_resident(self._planner.plan([first, *waiting]))
        logger.debug(
            "Residents for %d requests of %s: %d layers changed",
            1 + len(waiting),
            sorted({self._planner.profile.tasks[queued.task] for queued in [first, *waiting]}),
            self._planner.layers_changed - changed,
        )
