"""`serve.py` that SIGUSR1 does some harm to: the first argument says which, the rest is its own.

- ``kill:THREAD`` ends the thread of that name, by an exception at whatever it is doing.
- ``full`` lets no file grow past 1 KiB any more, as if the disk were full: a write gets an OSError.

`python -m tests.runtime.server.faulty kill:generation serve.port=0`
"""

import ctypes
import resource
import runpy
import signal
import sys
import threading
from collections.abc import Callable

from tests.runtime.server.processes import ROOT


def kill(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread; one that waits gets it when it wakes up."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )


def kill_named(name: str) -> None:
    """`kill` the one thread of this name."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
    kill(thread)


def fill(_: str) -> None:
    """Refuse every write past a file's first 1024 bytes; Python ignores the signal for it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


HARMS: dict[str, Callable[[str], None]] = {"kill": kill_named, "full": fill}


if __name__ == "__main__":
    name, _, argument = sys.argv.pop(1).partition(":")
    harm = HARMS[name]
    signal.signal(signal.SIGUSR1, lambda number, frame: harm(argument))
    runpy.run_path(str(ROOT / "serve.py"), run_name="__main__")
