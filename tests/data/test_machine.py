"""data/machine.py."""

import os

import torch

from data.machine import commit, hardware, versions


def test_hardware_is_what_this_machine_has() -> None:
    found = hardware()
    assert found["cpu"]
    assert found["cores"] == os.cpu_count()
    assert found["memory_bytes"] > 2**28
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_missing_package_is_absent() -> None:
    found = versions(("torch", "no-such-package"))
    assert found["torch"] == torch.__version__
    assert found["no-such-package"] == "absent"


def test_outside_of_git_there_is_no_commit(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
