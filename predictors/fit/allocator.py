"""Lets a fit use the same memory again, step after step.

A training step on a CPU makes the same large temporaries each time. glibc gives what is freed back
to the system and asks for it again, and the system clears every page anew: half of the time of the
forecaster's steps (docs/log.md). Knows nothing of what is trained.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3): these parameters, and where a process that allocates much ends up by itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ADAPTED_BYTES = (64 * 2**20, 32 * 2**20)
_NEVER_BYTES = (2**31 - 1, 2**31 - 1)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, the process keeps what is freed; afterwards it is given back.

    It holds for all threads of the process. Afterwards glibc's thresholds are the highest that it
    takes by itself; they no longer adapt to what is allocated. Under another C library nothing
    changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    _set_thresholds(libc, *_NEVER_BYTES)
    try:
        yield
    finally:
        _set_thresholds(libc, *_ADAPTED_BYTES)
        libc.malloc_trim(0)


def _set_thresholds(libc: ctypes.CDLL, trim_bytes: int, mmap_bytes: int) -> None:
    libc.mallopt(_M_TRIM_THRESHOLD, trim_bytes)
    libc.mallopt(_M_MMAP_THRESHOLD, mmap_bytes)
