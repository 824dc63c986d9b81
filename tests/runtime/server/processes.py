"""`python serve.py` as a process of its own: what tests start, ask, signal, and read the log of."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import openai

ROOT = Path(__file__).resolve().parents[3]
START_S = 90.0  # a limit for broken code on a busy machine; it takes about 4
MODEL = "tiny_moe"  # the name under which the embedded model is served

_PORT = re.compile(r"Serving on http://127\.0\.0\.1:(\d+)")
_SET_BY_USERS = ("MOECAST_API_KEY", "PYTHONPATH")


class ServerProcess:
    """A server on a free port of this machine, stopped at the end; a context manager.

    Args:
        folder: Where it keeps everything that it makes, its log among it.
        overrides: Options of `serve.py`.
        command: What is run instead of `serve.py`, with the same options.
    """

    def __init__(
        self, folder: Path, overrides: Sequence[str] = (), *, command: Sequence[str] = ("serve.py",)
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *command,
                    "device=cpu",
                    "serve.port=0",
                    f"paths.root={folder}",
                    *overrides,
                ],
                cwd=ROOT,
                env=bare_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

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
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    @property
    def address(self) -> str:
        """Where it is."""
        port = _PORT.search(self.log)
        assert port is not None, self.log
        return f"http://127.0.0.1:{port[1]}"

    def client(self) -> openai.OpenAI:
        """A client that asks once."""
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60
        )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        return self._process.wait(timeout=START_S)

    def metric(self, name: str) -> float:
        """The value of the one sample of this name."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        (line,) = [line for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line)]
        return float(line.rsplit(" ", 1)[1])

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            assert self._process.poll() is None, f"the server has ended:\n{self.log}"
            if _PORT.search(self.log):
                try:
                    if httpx.get(f"{self.address}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready in {START_S:g} s:\n{self.log}")


def bare_environment(**more: str) -> Mapping[str, str]:
    """This process's environment without what changes a server, on one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in _SET_BY_USERS}
    return {**kept, "OMP_NUM_THREADS": "1", **more}
