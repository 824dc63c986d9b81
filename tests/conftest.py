"""Fixtures that every test folder shares."""

import os
from pathlib import Path

import pytest
import torch

from tests.devices import set_up_triton

set_up_triton()

# On busy cores, threads that share tiny tensors mostly wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real traces, prompts and corpora; tests that need it skip without it."""
    path = Path(os.environ.get("MOECAST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found in {path}: set MOECAST_DATA to its folder")
    return path
