import threading
import time

from predictors.rwlock import ReadWriteLock

SOON_S = 0.05
TIMEOUT_S = 10.0


def started(target: object) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_readers_share() -> None:
    lock, both = ReadWriteLock(), threading.Barrier(2)

    def read() -> None:
        with lock.reading():
            both.wait(TIMEOUT_S)  # broken, and raises here, if the other one has to wait

    threads = [started(read) for _ in range(2)]
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not both.broken


def test_a_writer_waits_for_readers_and_readers_for_the_writer() -> None:
    lock, events = ReadWriteLock(), []
    may_write = threading.Event()

    def write() -> None:
        with lock.writing():
            events.append("writes")
            may_write.wait(TIMEOUT_S)
            events.append("written")

    def read() -> None:
        with lock.reading():
            events.append("reads")

    with lock.reading():
        writer = started(write)
        time.sleep(SOON_S)
        assert events == []
    while not events:
        time.sleep(0.001)
    reader = started(read)
    time.sleep(SOON_S)
    assert events == ["writes"]
    may_write.set()
    writer.join(TIMEOUT_S)
    reader.join(TIMEOUT_S)
    assert events == ["writes", "written", "reads"]


def test_a_waiting_writer_goes_before_readers_that_come_later() -> None:
    """A stream of readers that overlap would otherwise keep it out for ever."""
    lock, order = ReadWriteLock(), []

    def write() -> None:
        with lock.writing():
            order.append("writer")

    def read() -> None:
        with lock.reading():
            order.append("reader")

    with lock.reading():
        writer = started(write)
        time.sleep(SOON_S)
        reader = started(read)
        time.sleep(SOON_S)
    writer.join(TIMEOUT_S)
    reader.join(TIMEOUT_S)
    assert order == ["writer", "reader"]


def test_an_error_inside_frees_the_lock() -> None:
    lock = ReadWriteLock()
    for held in (lock.reading, lock.writing):
        try:
            with held():
                raise KeyError
        except KeyError:
            pass
    with lock.writing():
        pass
