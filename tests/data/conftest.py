"""What several tests of this folder are given."""

import pytest
from transformers import AutoTokenizer

from data.tiny_moe import TINY_MOE_DIR


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MOE_DIR)
