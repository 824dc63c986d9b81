"""What another thread wants done on the engine's, and its wait for that.

Knows nothing of engines.
"""

from collections.abc import Callable
from concurrent.futures import Future

from runtime.server.sequence import EngineUnavailableError


class Change:
    """A call that one thread asks for, and another one makes.

    Args:
        call: What is to be done.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._done: Future[None] = Future()

    def make(self) -> None:
        """Make the call, unless nobody waits any more; what goes wrong is for who waits.

        But for what ends threads, which goes on its way.
        """
        if not self._done.set_running_or_notify_cancel():
            return
        try:
            self._call()
        except Exception as error:
            self._done.set_exception(error)
        except BaseException:
            self._done.set_exception(EngineUnavailableError("the engine was interrupted"))
            raise
        else:
            self._done.set_result(None)

    def wait(self, timeout_s: float) -> None:
        """Wait until it is made; one that is under way at the end of patience will have been.

        Raises:
            EngineUnavailableError: It was not begun in time, and never will be.
            Exception: What the call raised.
        """
        try:
            self._done.result(timeout_s)
        except TimeoutError:
            if self._done.cancel():
                raise EngineUnavailableError("the engine was busy for too long") from None
            self._done.result()
