"""MoEpic's division of memory: the counts, the latency model, and two ways to search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.split_budget import (
    LayerStatistics,
    SplitStatistics,
    SplitTimes,
    allocate,
    allocate_optimally,
    expert_split,
    stall_of,
)

E, K = 6, 2
TIMES = SplitTimes(attention_s=1.0, moe_s=0.6, head_s=0.5, load_s=1.0)


def layers_from(seed: int, num_layers: int, skew: float = 1.0) -> list[LayerStatistics]:
    """Tokens that use popular experts more, with predictions that are right now and then."""
    rng = np.random.default_rng(seed)
    statistics = SplitStatistics(num_layers=num_layers, num_experts=E, top_k=K)
    popularity_LE = rng.random((num_layers, E)) ** (3 * skew) + 0.01
    for _ in range(60):
        for layer, popularity_E in enumerate(popularity_LE):
            used_E = np.zeros(E, bool)
            used_E[rng.choice(E, K, replace=False, p=popularity_E / popularity_E.sum())] = True
            said_E = used_E * 0.5 + rng.random(E)
            statistics.add(layer, priority_E=popularity_E, used_E=used_E, said_E=said_E)
    return statistics.layers()


def test_counts_are_what_caches_of_each_size_would_have_held() -> None:
    statistics = SplitStatistics(num_layers=1, num_experts=4, top_k=1)
    priority_E = np.array([0.1, 0.9, 0.5, 0.3])  # ranks 3, 0, 1, 2
    said_E = np.array([0.0, 0.2, 0.1, 0.9])  # predicted in the order 3, 1, 2, 0
    statistics.add(
        0, priority_E=priority_E, used_E=np.array([False, False, True, False]), said_E=said_E
    )
    statistics.add(
        0, priority_E=priority_E, used_E=np.array([False, False, False, True]), said_E=said_E
    )
    (layer,) = statistics.layers()
    assert layer.hit_C.tolist() == [0, 0, 0.5, 1, 1]
    assert layer.right_Y.tolist() == [0.5, 0, 0.5, 0]
    assert layer.cached_YC[0].tolist() == [0, 0, 0, 1, 1], "expert 3 has rank 2"
    assert layer.cached_YC[1].tolist() == [0, 1, 1, 1, 1], "expert 1 has rank 0"


def test_a_layer_without_tokens_has_no_shares() -> None:
    statistics = SplitStatistics(num_layers=2, num_experts=4, top_k=1)
    with pytest.raises(ValueError, match=r"tokens seen per layer: \[0.0, 0.0\]"):
        statistics.layers()


def test_eqs_5_to_7_by_hand() -> None:
    """Half of each expert cached, no window: present K/2, the rest travels, its top hides some."""
    layer = LayerStatistics(np.r_[0.0, np.ones(E)], np.zeros(E), np.ones((E, E + 1)), K)
    times = SplitTimes(attention_s=0.0, moe_s=0.6, head_s=0.0, load_s=1.0)
    plan = expert_split(np.array([0.5, 0.5]), [layer, layer], times)
    assert plan.cached_L.tolist() == [1, 1]
    # hide = 1 * 0.3, miss = 1 * 1.0; then a window of 0.6 - 0.3, in which nothing useful travels.
    np.testing.assert_allclose(plan.stall_L, [0.7, 0.7])
    np.testing.assert_allclose(plan.share_L, [0.5, 0.5])


def test_with_everything_in_memory_nothing_is_waited_for() -> None:
    layers = layers_from(0, 3)
    plan = expert_split(np.full(3, float(E)), layers, TIMES)
    assert plan.stall_s == 0.0
    assert plan.split_F(256) == [256] * 3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), memory=st.sampled_from([4.0, 6.0, 9.0, 14.0]))
def test_both_searches_stay_within_memory_and_never_lose_to_equal_shares(
    seed: int, memory: float
) -> None:
    layers = layers_from(seed, 3)
    equal = expert_split(np.full(3, memory / 3), layers, TIMES)
    greedy = allocate(memory, layers, TIMES)
    optimal = allocate_optimally(memory, layers, TIMES, unit=0.5)
    assert greedy.stall_s <= equal.stall_s + 1e-9
    for plan in (greedy, optimal):
        assert plan.memory_L.sum() <= memory + 1e-9
        assert (plan.cached_L >= plan.memory_L - 1e-9).all()
        assert (plan.memory_L > 0).all()
        np.testing.assert_allclose(
            plan.stall_L, stall_of(plan.memory_L, plan.cached_L, layers, TIMES)
        )


@pytest.mark.parametrize("seed", range(4))
def test_the_program_finds_what_trying_everything_finds(seed: int) -> None:
    layers = layers_from(seed, 3)
    memory = 6
    best_s = np.inf
    for memory_L in itertools.product(range(1, E + 1), repeat=3):
        if sum(memory_L) > memory:
            continue
        for cached_L in itertools.product(*(range(v, E + 1) for v in memory_L)):
            stalls_L = stall_of(np.array(memory_L, float), np.array(cached_L), layers, TIMES)
            best_s = min(best_s, stalls_L.sum())
    plan = allocate_optimally(memory, layers, TIMES, num_windows=400)
    assert best_s - 1e-9 <= plan.stall_s <= best_s * 1.02 + 1e-9


def test_memory_goes_to_the_layer_that_can_use_it() -> None:
    """One layer always uses the same two experts, the other any: the first is served first."""
    even = layers_from(1, 1, skew=0.0)[0]
    hit_C = np.r_[0.0, 0.5, np.ones(E - 1)]
    sharp = LayerStatistics(hit_C, np.zeros(E), even.cached_YC, K)
    no_window = SplitTimes(attention_s=0.0, moe_s=0.01, head_s=0.0, load_s=1.0)
    for plan in (
        allocate(4.0, [sharp, even], no_window),
        allocate_optimally(4.0, [sharp, even], no_window, unit=0.5),
    ):
        assert plan.memory_L[0] >= 1.9


def test_tops_are_whole_multiples_that_fit() -> None:
    layers = layers_from(2, 2)
    plan = expert_split(np.array([2.0, 3.0]), layers, TIMES)
    for split, share in zip(plan.split_F(1408), plan.share_L, strict=True):
        assert split % 64 == 0
        assert 64 <= split <= max(64, share * 1408 + 1e-6)


@pytest.mark.parametrize("memory", [0.0, -1.0, 19.0])
def test_impossible_memory_is_refused(memory: float) -> None:
    layers = layers_from(0, 3)
    for search in (allocate, allocate_optimally):
        with pytest.raises(ValueError, match="at most all 18 experts"):
            search(memory, layers, TIMES)
    with pytest.raises(ValueError, match="one unit"):
        allocate_optimally(2.0, layers, TIMES)


def test_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="load_s"):
        SplitTimes(attention_s=1.0, moe_s=1.0, head_s=1.0, load_s=0.0)
