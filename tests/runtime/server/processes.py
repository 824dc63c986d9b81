"""`python serve.py` as a process of its own: what tests start, ask, signal, and read the log of."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import openai

ROOT = Path(__file__).resolve().parents[3]
START_S = 90.0  # a limit for broken code on a busy machine; it takes about 4
MODEL = "tiny_moe"  # the name under which the embedded model is served

RunClient = Callable[..., str]  # runs an installed program against a server; gives what it prints

_PORT = re.compile(r"Serving on http://127\.0\.0\.1:(\d+)")
_SET_BY_USERS = ("MOECAST_API_KEY", "PYTHONPATH")


class ServerProcess:
    """A server on a free port of this machine, ended at the end; a context manager.

    Args:
        folder: Where it keeps everything that it makes.
        overrides: Options of `serve.py`.
        command: What is run instead of `serve.py`, with the same options.
    """

    def __init__(
        self, folder: Path, overrides: Sequence[str] = (), *, command: Sequence[str] = ("serve.py",)
    ) -> None:
        options = ["device=cpu", "serve.port=0", f"paths.root={folder}", *overrides]
        self._process = subprocess.Popen(
            [sys.executable, *command, *options],
            cwd=ROOT,
            env=bare_environment(),
            stdout=subprocess.PIPE,  # no file: those may be limited in size
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._clients = ExitStack()
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clients.close()
        self._process.kill()
        self.wait()

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    @property
    def address(self) -> str:
        """Where it is."""
        port = _PORT.search(self.log)
        assert port is not None, self.log
        return f"http://127.0.0.1:{port[1]}"

    @property
    def is_healthy(self) -> bool:
        """Whether it says that it answers requests."""
        try:
            return httpx.get(f"{self.address}/health").status_code == 200
        except httpx.TransportError:
            return False

    @cached_property
    def client(self) -> openai.OpenAI:
        """A client that asks once; for any thread."""
        client = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60
        )
        return self._clients.enter_context(client)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        status = self._process.wait(timeout=START_S)
        self._reader.join()
        return status

    def metric(self, name: str) -> float:
        """The value of the one sample of this name."""
        (value,) = self._samples(name)
        return value

    def total(self, name: str) -> float:
        """The sum over all labels; 0 where nothing was counted yet."""
        return sum(self._samples(name))

    def _samples(self, name: str) -> list[float]:
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        pattern = re.compile(rf"{re.escape(name)}(\{{.*\}})? ")
        return [float(line.rsplit(" ", 1)[1]) for line in lines if pattern.match(line)]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as printed:
            for line in printed:
                self._lines.append(line)

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_S
        while not (_PORT.search(self.log) and self.is_healthy):
            assert self._process.poll() is None, f"the server has ended:\n{self.log}"
            assert time.monotonic() < deadline_s, f"not ready in {START_S:g} s:\n{self.log}"
            time.sleep(0.05)


def bare_environment(**more: str) -> Mapping[str, str]:
    """This process's environment without what changes a server, on one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in _SET_BY_USERS}
    return {**kept, "OMP_NUM_THREADS": "1", **more}
