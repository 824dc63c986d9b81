"""Sizes are read with their units, and what is no size is named."""

from typing import Any

import pytest

from runtime.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [(7, 7), ("7", 7), ("12GiB", 12 * 2**30), ("800 MB", 800_000_000), ("1.5kb", 1500),
     ("1e9", 10**9), ("0.5 TiB", 2**39)],
)  # fmt: skip
def test_sizes_are_read_with_their_units(text: int | str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "12 bananas", "-3", 0, "1.2.3MB", "nan"])
def test_what_is_no_size_is_named(text: Any) -> None:
    with pytest.raises(ValueError, match=f"{text!r} is no size"):
        parse_bytes(text)
