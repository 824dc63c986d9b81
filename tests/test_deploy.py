"""What is shipped for deployment says what the server understands, and is closed by default."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from conf import schema
from runtime.server.security import is_loopback

DEPLOY = Path(__file__).parent.parent / "deploy"


def settings(overrides: list[str]) -> Any:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("serve", overrides=overrides)


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def unit() -> dict[str, str]:
    text = (DEPLOY / "moecast.service").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_image_runs_the_server_with_options_that_exist(dockerfile: str) -> None:
    (entry,) = [line for line in dockerfile.splitlines() if line.startswith("ENTRYPOINT ")]
    command = json.loads(entry.removeprefix("ENTRYPOINT "))
    assert command[:2] == ["python", "serve.py"]
    cfg = settings(command[2:])
    assert cfg.paths.artifacts == "/data/artifacts"
    assert not is_loopback(cfg.serve.host)  # so that the server insists on a key
    assert cfg.serve.api_key_file is None
    assert f"127.0.0.1:{cfg.serve.port}/health" in dockerfile


def test_the_image_does_not_run_as_root_and_copies_what_exists(dockerfile: str) -> None:
    lines = dockerfile.splitlines()
    user, entry = lines.index("USER moecast"), lines.index("VOLUME /data")
    assert user < entry
    assert not any(line.startswith("USER root") for line in lines)
    root = DEPLOY.parent
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert all((root / source).exists() for source in sources), line


def test_the_unit_runs_the_server_with_options_that_exist(unit: dict[str, str]) -> None:
    command = shlex.split(unit["ExecStart"])
    assert command[1] == "serve.py"
    *options, keys = command[2:]
    assert keys == "serve.api_key_file=%d/keys"
    cfg = settings(options)
    assert is_loopback(cfg.serve.host)
    assert cfg.paths.root == f"/var/lib/{unit['StateDirectory']}"
    assert int(unit["TimeoutStopSec"]) > cfg.serve.drain_s
    assert unit["User"] == "moecast"
    assert shlex.split(unit["ExecReload"]) == ["/bin/kill", "-HUP", "$MAINPID"]
