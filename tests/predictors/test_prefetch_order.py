import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from predictors.prefetch_order import Prefetch, PrefetchPlan, chosen_experts

ROW = torch.tensor([[0.05, 0.4, 0.3, 0.2, 0.05]])


def chosen(score: float, top_k: int = 1) -> list[int]:
    return chosen_experts(ROW, torch.tensor([score]), top_k=top_k)[0].nonzero().flatten().tolist()


def test_a_perfect_match_fetches_k_experts_and_a_poor_one_more() -> None:
    assert chosen(1.0) == [1]
    assert chosen(1.0, top_k=2) == [1, 2]
    assert chosen(0.65) == [1]
    assert chosen(0.31) == [1, 2]
    assert chosen(0.2) == [1, 2, 3]
    assert chosen(0.0) == [0, 1, 2, 3, 4]
    assert chosen(-0.5) == chosen(0.0)


def test_the_expert_that_crosses_the_threshold_is_among_them() -> None:
    """The released code stops before it: 0.4 + 0.3 < 0.75, so it would fetch two of these three."""
    assert chosen(0.25) == [1, 2, 3]


def test_a_row_with_all_its_mass_on_few_experts_never_asks_for_more() -> None:
    """Float32 thirds sum to just below 1: without slack all six experts would be fetched."""
    third = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]])
    assert int(chosen_experts(third, torch.zeros(1), top_k=1).sum()) == 3


@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=16),
    score=st.floats(-1.0, 1.0),
    top_k=st.integers(1, 2),
)
def test_chosen_mass_reaches_delta_with_as_few_experts_as_possible(
    weights: list[float], score: float, top_k: int
) -> None:
    row_1E = torch.tensor([weights], dtype=torch.float64)
    row_1E /= row_1E.sum()
    delta = min(1.0, max(0.0, 1.0 - score))
    mask_E = chosen_experts(row_1E, torch.tensor([score], dtype=torch.float64), top_k=top_k)[0]
    mass_M = row_1E[0][mask_E].sort(descending=True).values
    assert float(mass_M.sum()) >= delta - 1e-6
    assert len(mass_M) >= top_k
    assert float(mass_M.min()) >= float(row_1E[0][~mask_E].max() if (~mask_E).any() else 0.0)
    if len(mass_M) > top_k:
        assert float(mass_M[:-1].sum()) < delta


def test_experts_are_ordered_by_probability_over_distance() -> None:
    plan = PrefetchPlan(top_k=2)
    plan.add(1, torch.tensor([[0.6, 0.4, 0.0]]), torch.ones(1))
    plan.add(3, torch.tensor([[0.0, 0.1, 0.9]]), torch.ones(1))
    before = plan.order(-1)
    assert [item[:2] for item in before] == [(1, 0), (3, 2), (1, 1), (3, 1)]
    assert [item.priority for item in before] == pytest.approx([0.3, 0.225, 0.2, 0.025])
    assert [item[:2] for item in plan.order(0)] == [(1, 0), (1, 1), (3, 2), (3, 1)]
    # Layer 1 is being executed: what it needs is no prefetch any more.
    assert [item[:2] for item in plan.order(1)] == [(3, 2), (3, 1)]
    assert plan.order(3) == []


def test_what_is_queued_is_what_was_chosen() -> None:
    """The released code adds 1e-6 to every expert and queues all that are above 0."""
    generator = torch.Generator().manual_seed(0)
    plan = PrefetchPlan(top_k=2)
    scores = torch.rand(6, generator=generator)
    for layer in range(6):
        probs_1E = torch.rand(1, 8, generator=generator).softmax(dim=1)
        plan.add(layer, probs_1E, scores[layer, None])
    queued = {(item.layer, item.expert) for item in plan.order(-1)}
    wanted = {
        (layer, expert)
        for layer in range(6)
        for expert in plan.chosen_E(layer).nonzero().flatten().tolist()
    }
    assert queued == wanted
    assert len(queued) < 6 * 8


def test_tokens_routed_together_need_what_any_of_them_needs() -> None:
    plan = PrefetchPlan(top_k=1)
    plan.add(0, torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.ones(2))
    assert plan.order(-1) == [
        Prefetch(0, 0, pytest.approx(0.9)),
        Prefetch(0, 1, pytest.approx(0.8)),
    ]
