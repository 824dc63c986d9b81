"""The embedded model, loaded once for all tests of the server."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tiny_moe import TINY_MOE_DIR


@pytest.fixture(scope="session")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MOE_DIR)
