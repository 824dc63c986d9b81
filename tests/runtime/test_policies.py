import functools
import itertools
import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cache import next_uses

from predictors.base import Forecast
from runtime.cache import ExpertCache
from runtime.policies import POLICIES, make_policy
from runtime.policies.base import Policy, Usage, later_use

CONF = Path(__file__).resolve().parents[2] / "conf" / "policy"


def usage(
    *, step: int, last_use=(), inserted=(), use_count=(), shape: tuple[int, ...] = (1, 3)
) -> Usage:
    def field(values) -> torch.Tensor:
        return torch.tensor(list(values) or [0] * shape[-1]).expand(shape).clone()

    return Usage(
        step_L1=torch.full((shape[-2], 1), step),
        resident_LE=torch.ones(shape, dtype=torch.bool),
        last_use_LE=field(last_use),
        inserted_LE=field(inserted),
        use_count_LE=field(use_count),
        decayed_uses={},
    )


def order(name: str, past: Usage, forecast_LE: torch.Tensor | None = None) -> list[int]:
    """Experts from the first to be evicted to the last."""
    return make_policy(name).keep_scores(past, forecast_LE)[0].argsort(stable=True).tolist()


def hits(name: str, events: list[set[int]], num_experts: int, slots: int) -> int:
    cache = ExpertCache(make_policy(name), num_layers=1, num_experts=num_experts, slots=slots)
    count = 0
    for needed, forecast in zip(events, next_uses(events, num_experts), strict=True):
        needed_LE = torch.zeros(1, num_experts, dtype=torch.bool)
        needed_LE[0, list(needed)] = True
        step = cache.step(needed_LE, forecast_LE=torch.tensor([forecast]), max_needed=slots)
        count += int(step.hit_LE.sum())
    return count


def most_hits_possible(events: list[set[int]], slots: int) -> int:
    """Try every choice of victims: at the end of an event all that it needed is resident."""

    @functools.cache
    def best(t: int, resident: frozenset[int]) -> int:
        if t == len(events):
            return 0
        needed = events[t]
        others = sorted(resident - needed)
        num_kept = min(len(others), slots - len(needed))
        return len(resident & needed) + max(
            best(t + 1, frozenset(kept) | needed)
            for kept in itertools.combinations(others, num_kept)
        )

    return best(0, frozenset())


def test_fifo_evicts_the_first_arrival() -> None:
    assert order("fifo", usage(step=9, inserted=(5, 2, 7))) == [1, 0, 2]


def test_lru_evicts_the_least_recently_used() -> None:
    assert order("lru", usage(step=9, last_use=(5, 9, 4))) == [2, 0, 1]


def test_lfu_evicts_the_least_used_and_among_equals_the_oldest() -> None:
    assert order("lfu", usage(step=9, last_use=(8, 3, 9), use_count=(2, 2, 1))) == [2, 1, 0]


def test_lfru_divides_the_count_by_the_age_plus_one() -> None:
    past = usage(step=9, last_use=(9, 7, 5), use_count=(1, 6, 4))
    scores_LE = make_policy("lfru").keep_scores(past, None)
    assert scores_LE[0].tolist() == pytest.approx([1.0, 2.0, 0.8])


@pytest.mark.parametrize("name", ["forecast", "belady"])
def test_forecast_and_belady_evict_the_lowest_forecast(name: str) -> None:
    assert order(name, usage(step=1), torch.tensor([[0.3, 0.1, 0.2]])) == [1, 2, 0]
    with pytest.raises(ValueError, match="needs a forecast"):
        make_policy(name).keep_scores(usage(step=1), None)


def test_later_use_leaves_out_the_token_being_served() -> None:
    next_LE = torch.tensor([[0.5, 0.0]])
    forecast = Forecast.stationary(next_LE, gamma=0.9)
    torch.testing.assert_close(later_use(forecast), 9 * next_LE)


@pytest.mark.parametrize("name", POLICIES)
def test_scores_are_float32_of_any_leading_shape_whatever_the_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        past = usage(step=3, last_use=(1, 2, 3), use_count=(1, 1, 1), shape=(2, 5, 4, 3))
        scores = make_policy(name).keep_scores(past, torch.zeros(4, 3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.dtype == torch.float32
    assert scores.expand(2, 5, 4, 3).isfinite().all()


def test_a_new_policy_is_one_class_that_reads_decayed_uses() -> None:
    class Decayed(Policy):
        name = "decayed"
        half_lives = (1.0,)

        def keep_scores(self, usage: Usage, forecast_LE: torch.Tensor | None) -> torch.Tensor:
            return usage.decayed_uses[1.0]

    cache = ExpertCache(Decayed(), num_layers=2, num_experts=3, slots=2)
    for layer, expert in itertools.product(range(2), (0, 0, 1, 1)):
        cache.step(torch.arange(3) == expert, layer=layer)
    expected_E = [0.25 + 0.125, 1.5, 0.0]
    assert cache.usage.decayed_uses[1.0].tolist() == [expected_E] * 2
    assert cache.step(torch.arange(3) == 2, layer=0).evict_LE.tolist() == [True, False, False]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=2), min_size=1, max_size=9),
    st.integers(2, 4),
)
def test_belady_is_optimal_among_caches_that_insert_every_miss(
    events: list[set[int]], slots: int
) -> None:
    """Equal slots, one layer, no event larger than the cache: exactly the optimum, not a bound."""
    assert hits("belady", events, 6, slots) == most_hits_possible(events, slots)


def test_belady_beats_every_causal_policy_on_a_longer_trace() -> None:
    rnd = random.Random(0)
    events = [set(rnd.sample(range(16), 4)) for _ in range(150)]
    for slots in (4, 10):
        belady = hits("belady", events, 16, slots)
        for name in ("fifo", "lru", "lfu", "lfru"):
            assert hits(name, events, 16, slots) <= belady


def test_an_unknown_policy_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'lruu' does not exist; there are fifo, lru, lfu, lfru"):
        make_policy("lruu")


def test_an_unknown_argument_of_a_policy_is_refused() -> None:
    with pytest.raises(TypeError):
        make_policy("lru", omega=3)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_file_and_a_config_that_explains_it(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    cls = POLICIES[name]
    assert cls.__module__ == f"runtime.policies.{name}"
    assert yaml.safe_load(text) == {"_target_": f"{cls.__module__}.{cls.__name__}"}


def test_no_config_names_a_policy_that_does_not_exist() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(POLICIES)
