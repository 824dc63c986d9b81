"""A new artifact takes the served predictor's place, without a restart.

On SIGHUP, or where polling is asked for, the artifact is looked for again. It is read and checked
(`predictors.artifact.load_artifact` compares every file's checksum) while the old predictor serves,
and takes over between two steps of the engine. One that is damaged, or of another model, is refused
with a line in the log and a metric: the old one goes on. What was wrong only for now (an engine too
busy, a disk that could not be read) is tried again at the next look.

Without a predictor there is nothing to replace, and SIGHUP only says so (`hear_hangups`): its
default would end the process.

No request can name a path: where artifacts come from is the operator's configuration alone.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch

from data.schema import MoESpec
from predictors.artifact import artifact_digest, load_artifact
from predictors.base import Predictor
from runtime.server.sequence import EngineUnavailableError

logger = logging.getLogger(__name__)

_PASSING = (EngineUnavailableError, OSError, torch.OutOfMemoryError)  # no fault of the artifact's


class SwapFn(Protocol):
    """Puts a predictor into service; raises where it cannot serve."""

    def __call__(self, predictor: Predictor) -> None:
        """Swap, and return once it is done."""
        ...


class ArtifactReloader:
    """Watches for a new artifact on a thread of its own; a context manager.

    Args:
        find: Where the artifact is now; None if there is none.
        served: `artifact_digest` of the one that is served, taken before that was read.
        spec: The served model's MoE.
        swap: Puts a predictor into service.
        poll_s: Seconds between looks; 0 looks on SIGHUP alone.

    Attributes:
        num_reloads: Artifacts that took over.
        num_refusals: Looks that ended otherwise; one that ends as the look before is not counted.

    Raises:
        ValueError: ``poll_s`` is negative.
    """

    def __init__(
        self,
        *,
        find: Callable[[], Path | None],
        served: str,
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
        self._seen = served  # or refused for good
        self._refusal: tuple[Path | None, str] | None = None  # as told last
        self._is_forced = False
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
        self._is_forced = True
        self._asked.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request()

    def _watch(self) -> None:
        while not self._is_over:
            try:
                self._asked.wait(self._poll_s or None)
                self._asked.clear()
                if not self._is_over:
                    self._look()
            except BaseException:  # who is killed, too, must go on: nobody else hears SIGHUP
                logger.critical(
                    "A look for artifacts was broken off; the next follows", exc_info=True
                )
                self._asked.set()  # it may have been asked for

    def _look(self) -> None:
        is_forced, self._is_forced = self._is_forced, False
        if is_forced:
            self._refusal = None
        path = digest = None
        try:
            path = self._find()
            if path is None:
                return
            digest = artifact_digest(path)
            if digest == self._seen and not is_forced:
                return
            predictor = load_artifact(path, expect=self._spec)
            self._swap(predictor)
        except Exception as error:  # whatever it is: who watches must go on watching
            if digest is not None and not isinstance(error, _PASSING):
                self._seen = digest
            self._refuse(path, error)
        else:
            self._seen, self._refusal = digest, None
            self.num_reloads += 1
            logger.info("Artifact %s serves now: predictor %s", path, predictor.kind)

    def _refuse(self, path: Path | None, error: Exception) -> None:
        refusal = (path, f"{type(error).__name__}: {error}")
        if refusal == self._refusal:
            return
        self._refusal = refusal
        self.num_refusals += 1
        logger.error("Artifact %s is refused, the old one goes on: %s", path or "search", error)
        logger.debug("raised here:", exc_info=error)


@contextmanager
def hear_hangups() -> Iterator[None]:
    """While nobody reloads, say so on SIGHUP and go on; only the main thread hears signals."""

    def say(number: int, frame: FrameType | None) -> None:
        logger.warning("SIGHUP: no predictor is served yet, so no artifact is looked for")

    before = signal.signal(signal.SIGHUP, say)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
