"""Budgets as users write them become slots, and wrong ones say what would be right."""

import pytest

from data.schema import MoESpec
from runtime.budget import parse_budget, slots_at

SPEC = MoESpec(
    model_id="m", num_experts=8, top_k=2, decoder_layers=(1, 2), expert_bytes_per_layer=(100, 150)
)


def test_a_share_rounds_but_always_holds_one_token() -> None:
    assert slots_at(0.4, SPEC) == 3
    assert slots_at(0.01, SPEC) == SPEC.top_k
    with pytest.raises(ValueError, match=r"residency=1\.5"):
        slots_at(1.5, SPEC)


def test_users_write_shares_or_memory() -> None:
    assert parse_budget("50%", SPEC) == 4
    assert parse_budget("1 kB", SPEC) == 4
    with pytest.raises(ValueError, match="as in 25%"):
        parse_budget("many%", SPEC)
    with pytest.raises(ValueError, match=r"residency=0\.0"):
        parse_budget("0%", SPEC)


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match="500 bytes"):
        parse_budget("499 B", SPEC)
