"""How sequences end: who is told, and what is kept of them.

Whoever waits for a sequence hears of its end last, once its place is free: it may ask again at
once. Knows nothing of how sequences run.
"""

import logging
from collections.abc import Callable

from runtime.server.decoding import Decoding
from runtime.server.objectives import Objectives
from runtime.server.recording import TrafficRecorder
from runtime.server.sequence import ExpertOffload, Failure, Generation, Outcome

logger = logging.getLogger(__name__)

EndFn = Callable[[Generation, Outcome], None]


class Endings:
    """Ends the sequences of one worker.

    Args:
        on_end: Called once for each.
        offload: Forgets, or remembers, what each has used; or None.
        objectives: Told of each, or None.
        recorder: Gets those that were answered, with their routing; or None.
    """

    def __init__(
        self,
        *,
        on_end: EndFn,
        offload: ExpertOffload | None,
        objectives: Objectives | None,
        recorder: TrafficRecorder | None,
    ) -> None:
        self._on_end = on_end
        self._offload, self._objectives, self._recorder = offload, objectives, recorder

    def finish(self, decoding: Decoding) -> None:
        """It has its last token, which nobody has said yet."""
        assert decoding.finish_reason is not None
        assert decoding.last_piece is not None
        self._record(decoding)
        self.end(decoding, decoding.finish_reason)
        decoding.generation.sink(decoding.last_piece)

    def fail(self, decoding: Decoding, error: Exception, outcome: Outcome) -> None:
        """It ends with an error, which whoever waits for it is told."""
        try:
            self.end(decoding, outcome)
        finally:
            decoding.generation.sink(Failure(decoding.generation.index, error))

    def end(self, decoding: Decoding, outcome: Outcome) -> None:
        """It ends, and nobody waits for it or is told elsewhere."""
        if self._offload is not None:
            self._offload.end_request(decoding.key, remember=outcome in ("stop", "length"))
        if self._objectives is not None:
            self._objectives.end(decoding, outcome)
        self._on_end(decoding.generation, outcome)

    def _record(self, decoding: Decoding) -> None:
        if self._recorder is None:
            return
        if (routed := decoding.routed()) is not None:
            self._recorder.add(routed)
        elif not self._recorder.is_active:
            self._recorder.leave_out()
