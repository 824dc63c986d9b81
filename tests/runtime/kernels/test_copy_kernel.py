"""Pieces of memory arrive whole, and nothing beside them changes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.copy import copy_records
from tests.devices import KERNEL_DEVICE


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.integers(1, 5))
def test_pieces_arrive_whole_and_alone(words: list[int], programs: int) -> None:
    source = torch.randint(0, 1 << 60, (len(words), 512), device=KERNEL_DEVICE)
    target = torch.full_like(source, -1)
    copy_records(
        torch.tensor([row.data_ptr() for row in source], device=KERNEL_DEVICE),
        torch.tensor([row.data_ptr() for row in target], device=KERNEL_DEVICE),
        torch.tensor([16 * count for count in words], device=KERNEL_DEVICE),
        programs_per_record=programs,
    )
    for count, old, new in zip(words, source, target, strict=True):
        assert torch.equal(new[: 2 * count], old[: 2 * count])
        assert (new[2 * count :] == -1).all()
