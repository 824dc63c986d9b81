"""Budgets become slots, and wrong ones say what would be right."""

from typing import Any

import pytest

from data.schema import MoESpec
from runtime.budget import parse_bytes, slots_per_layer

SPEC = MoESpec(
    model_id="m", num_experts=8, top_k=2, decoder_layers=(1, 2), expert_bytes_per_layer=(100, 150)
)


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


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [({"slots": 3}, (3, 3)), ({"slots": [2, 8]}, (2, 8)), ({"budget_bytes": 999}, (3, 3)),
     ({"budget_bytes": "500B"}, (2, 2)), ({"budget_bytes": "1GB"}, (8, 8))],
)  # fmt: skip
def test_slots_follow_what_is_granted(arguments: Any, slots: tuple[int, ...]) -> None:
    assert slots_per_layer(SPEC, **arguments) == slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "exactly one"), ({"slots": 3, "budget_bytes": 999}, "exactly one"),
     ({"slots": 1}, "slots=1 for layer 0: must be in top_k=2..num_experts=8"),
     ({"slots": [3, 9]}, "slots=9 for layer 1"), ({"slots": [3]}, "1 entries"),
     ({"budget_bytes": 499}, "pays for 1 slots.*smallest budget that works.*500 bytes")],
)  # fmt: skip
def test_what_cannot_work_says_what_would(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slots_per_layer(SPEC, **arguments)


def test_a_budget_needs_to_know_what_an_expert_weighs() -> None:
    spec = MoESpec(model_id="m", num_experts=8, top_k=2, decoder_layers=(0,))
    with pytest.raises(ValueError, match="does not say what an expert weighs"):
        slots_per_layer(spec, budget_bytes=10**6)
