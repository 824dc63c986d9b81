"""A lock that many readers share and one writer has alone. Knows nothing of what it guards."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Readers do not wait for each other; a writer that waits goes before readers that come later.

    Not reentrant: a thread that holds it must not ask for it again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_readers = 0
        self._num_writers_waiting = 0
        self._written = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Held together with other readers."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._written or self._num_writers_waiting))
            self._num_readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_readers -= 1
                if not self._num_readers:
                    self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Held alone."""
        with self._changed:
            self._num_writers_waiting += 1
            self._changed.wait_for(lambda: not (self._written or self._num_readers))
            self._num_writers_waiting -= 1
            self._written = True
        try:
            yield
        finally:
            with self._changed:
                self._written = False
                self._changed.notify_all()
