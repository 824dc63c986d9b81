"""A new artifact takes the served predictor's place, without a restart.

On SIGHUP, or where polling is asked for, the artifact is looked for again. It is read and checked
(`predictors.artifact.load_artifact` compares every file's checksum) while the old predictor serves,
and takes over between two steps of the engine. One that is damaged, or of another model, is refused
with a line in the log and a metric: the old one goes on.

No request can name a path: where artifacts come from is the operator's configuration alone.
"""

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from data.errors import MoecastError
from data.schema import MoESpec
from predictors.artifact import artifact_digest, load_artifact
from predictors.base import Predictor

logger = logging.getLogger(__name__)


class SwapFn(Protocol):
    """Puts a predictor into service; raises where it cannot serve."""

    def __call__(self, predictor: Predictor) -> None:
        """Swap, and return once it is done."""
        ...


class ArtifactReloader:
    """Watches for a new artifact on a thread of its own; a context manager.

    Args:
        find: Where the artifact is now; None if there is none.
        served: The one that is served.
        spec: The served model's MoE.
        swap: Puts a predictor into service.
        poll_s: Seconds between looks; 0 looks on SIGHUP alone.

    Attributes:
        num_reloads: Artifacts that took over.
        num_refusals: Artifacts that could not.

    Raises:
        ValueError: ``poll_s`` is negative.
    """

    def __init__(
        self,
        *,
        find: Callable[[], Path | None],
        served: Path,
        spec: MoESpec,
        swap: SwapFn,
        poll_s: float = 0.0,
    ) -> None:
        if poll_s < 0:
            raise ValueError(f"artifact_reload_s={poll_s}: must be at least 0 (0 does not poll)")
        self._find = find
        self._spec = spec
        self._swap = swap
        self._poll_s = poll_s
        self._seen: str | None = artifact_digest(served)
        self._asked = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._watch, name="artifact", daemon=True)
        self._before: Any = None
        self.num_reloads = self.num_refusals = 0

    def __enter__(self) -> Self:
        """Begin to watch; only the main thread's may hear signals."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGHUP, self._on_signal)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        if self._before is not None:
            signal.signal(signal.SIGHUP, self._before)
        self._is_over = True
        self._asked.set()
        self._thread.join()

    def request(self) -> None:
        """Look now, whether or not it is another one than before; returns at once."""
        self._seen = None
        self._asked.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request()

    def _watch(self) -> None:
        while True:
            self._asked.wait(self._poll_s or None)
            self._asked.clear()
            if self._is_over:
                return
            self._look()

    def _look(self) -> None:
        path = self._find()
        if path is None:
            return
        try:
            digest = artifact_digest(path)
            if digest == self._seen:
                return
            self._seen = digest  # of a refused one, too: it is told once
            predictor = load_artifact(path, expect=self._spec)
            self._swap(predictor)
        except (MoecastError, ValueError, OSError, RuntimeError) as error:
            self.num_refusals += 1
            logger.error("Artifact %s is refused, the old one goes on: %s", path, error)
        else:
            self.num_reloads += 1
            logger.info("Artifact %s serves now: predictor %s", path, predictor.kind)
