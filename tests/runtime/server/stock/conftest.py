"""A real server process, and the programs of other people that are run against it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.server.processes import ROOT, RunClient, ServerProcess, bare_environment

CLIENTS = ROOT / ".venv" / "clients"
RUN_S = 120.0  # a limit for broken code on a busy machine; each takes about 10


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`python serve.py`, as a newcomer starts it."""
    with ServerProcess(tmp_path_factory.mktemp("stock")) as server:
        yield server


@pytest.fixture
def run_client(tmp_path: Path) -> RunClient:
    """Run an installed program by its module's name; gives what it printed."""
    installed = CLIENTS / ".installed"
    assert installed.is_file(), f"{installed} is not there: `make clients` installs the programs"
    # Nothing is asked of any hub, and nothing is left in anybody's cache.
    environment = bare_environment(
        PYTHONPATH=str(CLIENTS), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")
    )

    def run(module: str, *arguments: str, cwd: Path = tmp_path) -> str:
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_S,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run
