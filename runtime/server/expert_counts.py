"""An offload's counters for whoever scrapes, read where nothing else runs: on the engine's thread.

On a GPU the counters lie in its memory. Read from another thread, that copy could fall between the
operations of a decode step that is being captured and break the capture. So the engine's thread
reads them between two steps. Where it does not get there in time (a long prompt, a model that is
still loaded, an engine that has ended) whoever asks gets those read last, and is told how old they
are.

Knows nothing of Prometheus or HTTP.
"""

import logging
import time
from typing import NamedTuple

from runtime.backend import OffloadStats
from runtime.server.generation import GenerationEngine
from runtime.server.sequence import ExpertOffload

logger = logging.getLogger(__name__)


class Counted(NamedTuple):
    """Counters, and how long ago they were read.

    Attributes:
        stats: The counters.
        age_s: 0 where they are those of now.
    """

    stats: OffloadStats
    age_s: float


class ExpertCounts:
    """Reads the counters of an engine's offload; make it before the engine starts.

    Args:
        engine: On whose thread they are read.
        offload: Whose they are.
        patience_s: How long to wait for the end of a step.
    """

    def __init__(
        self, engine: GenerationEngine, offload: ExpertOffload, *, patience_s: float = 1.0
    ) -> None:
        self._engine = engine
        self._offload = offload
        self._patience_s = patience_s
        self._is_late = False
        self._read()  # nothing else runs yet

    def __call__(self) -> Counted:
        """The counters of now, or those read last; from any thread but the engine's."""
        try:
            self._engine.between_steps(self._read, timeout_s=self._patience_s)
        except Exception as error:  # whatever it is: those read last are still true of then
            stats, read_s = self._latest
            age_s = time.monotonic() - read_s
            if not self._is_late:
                logger.warning("Expert counters are those of %.1f s ago: %s", age_s, error)
            self._is_late = True
            return Counted(stats, age_s)
        self._is_late = False
        return Counted(self._latest[0], 0.0)

    def _read(self) -> None:
        self._latest = self._offload.stats(), time.monotonic()
