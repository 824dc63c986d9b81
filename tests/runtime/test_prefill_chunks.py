"""A prompt in chunks says what it says whole, and a trial tells what the longest one takes."""

import pytest
import torch
from torch import Tensor

from runtime.engine import attach
from runtime.prefill_chunks import chunked_prefill, try_prefill
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model

DEVICE = torch.device(KERNEL_DEVICE)


def test_a_prompt_in_chunks_gives_the_same_text() -> None:
    model = tiny_model("qwen3_moe")
    ids_BT = torch.tensor([[(7 * n) % 31 for n in range(40)]])

    def text() -> list[list[int]]:
        said: Tensor = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=5, do_sample=False
        )
        return said.tolist()

    expected = text()
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with attach(model, slots=5), chunked_prefill(model, 16):
        assert text() == expected
    handle.remove()
    assert lengths[:3] == [16, 16, 8]
    assert model.generation_config.prefill_chunk_size is None
    with pytest.raises(ValueError, match="chunk_tokens=0"), chunked_prefill(model, 0):
        pass


def test_a_trial_of_the_longest_prompt_says_what_it_took() -> None:
    model = tiny_model("mixtral").to(DEVICE)
    trial = try_prefill(model, 33, planned_bytes=1000)
    assert trial.tokens == 33
    assert trial.spent_s > 0
    if DEVICE.type == "cpu":
        assert trial.peak_bytes is None
        assert trial.peak_over_plan is None
    else:
        assert trial.peak_over_plan == trial.peak_bytes / 1000
    with pytest.raises(ValueError, match="tokens=0"):
        try_prefill(model, 0)
