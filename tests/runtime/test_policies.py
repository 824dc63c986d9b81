import functools
import itertools
import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cache import KEEP, ReferenceCache, next_uses

from predictors.base import Forecast
from runtime.cache import ExpertCache
from runtime.policies import POLICIES, make_policy
from runtime.policies.base import Policy, Usage, later_use
from runtime.policies.lcp import Lcp
from runtime.policies.least_stale import LeastStale
from runtime.policies.random import Random

CONF = Path(__file__).resolve().parents[2] / "conf" / "policy"


def usage(
    *, step: int, last_use=(), inserted=(), use_count=(), visits=(), shape: tuple[int, ...] = (1, 3)
) -> Usage:
    def field(values) -> torch.Tensor:
        return torch.tensor(list(values) or [0] * shape[-1]).expand(shape).clone()

    return Usage(
        step_L1=torch.full((shape[-2], 1), step),
        resident_LE=torch.ones(shape, dtype=torch.bool),
        last_use_LE=field(last_use),
        inserted_LE=field(inserted),
        use_count_LE=field(use_count),
        visits_LE=field(visits),
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


def test_lcp_quarters_a_count_every_128_idle_steps() -> None:
    past = usage(step=257, last_use=(257, 129, 1), use_count=(3, 12, 64))
    scores_LE = make_policy("lcp").keep_scores(past, None)
    assert scores_LE.exp2()[0].tolist() == pytest.approx([3.0, 12 / 4, 64 / 16])


def test_lcp_forgets_as_told_and_orders_what_idled_for_long() -> None:
    past = usage(step=10, last_use=(10, 9, 8), use_count=(1, 4, 8))
    scores_LE = Lcp(rho=0.5, omega=1).keep_scores(past, None)
    assert scores_LE.exp2()[0].tolist() == pytest.approx([1.0, 2.0, 2.0])
    # 0.25 ** (10**6 / 128) is 0 in float32 and float64 alike.
    assert order("lcp", usage(step=10**6, last_use=(9, 8, 7), use_count=(1, 1, 1))) == [2, 1, 0]
    assert order("lcp", usage(step=10**6, last_use=(7, 9, 9), use_count=(1, 1, 0))) == [2, 0, 1]


def test_lcp_without_forgetting_is_lfu_by_the_count_alone() -> None:
    past = usage(step=999, last_use=(1, 998, 999), use_count=(7, 6, 5))
    assert Lcp(rho=1.0).keep_scores(past, None)[0].argsort().tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, r"rho=0.0: must be in \(0, 1\]"),
        ({"rho": 1.5}, r"rho=1.5: must be in \(0, 1\]"),
        ({"rho": float("nan")}, r"rho=nan: must be"),
        ({"omega": 0}, "omega=0: must be a positive number of steps"),
        ({"omega": float("inf")}, "omega=inf: must be"),
    ],
)
def test_lcp_names_constants_that_are_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lcp(**arguments)


def test_finemoe_multiplies_the_forecast_with_the_visits_of_this_stay() -> None:
    past = usage(step=9, last_use=(1, 9, 5), use_count=(90, 90, 90), visits=(4, 1, 2))
    scores_LE = make_policy("finemoe").keep_scores(past, torch.tensor([[0.1, 0.3, 0.25]]))
    assert scores_LE[0].tolist() == pytest.approx([0.4, 0.3, 0.5])


def test_finemoe_lets_the_impossible_go_first_and_is_lfu_where_nothing_is_forecast() -> None:
    past = usage(step=9, visits=(1000, 3, 1))
    assert order("finemoe", past, torch.tensor([[0.0, 0.0, 1e-4]])) == [1, 0, 2]
    assert order("finemoe", past, torch.zeros(1, 3)) == [2, 1, 0]
    # A forecast minus its first term may miss 0 by a rounding.
    assert order("finemoe", past, torch.full((1, 3), -1e-9)) == [2, 1, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, 5), min_size=1, max_size=4),
            st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=6, max_size=6),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 5),
)
def test_finemoe_counts_visits_as_a_plain_cache_does(events: list, slots: int) -> None:
    cache = ExpertCache(make_policy("finemoe"), num_layers=1, num_experts=6, slots=slots)
    plain = ReferenceCache(KEEP["finemoe"], slots, [1] * 6)
    for needed, forecast in events:
        needed_LE = torch.zeros(1, 6, dtype=torch.bool)
        needed_LE[0, list(needed)] = True
        step = cache.step(needed_LE, forecast_LE=torch.tensor([forecast]))
        plain.forecast = forecast
        _, inserted, evicted, _ = plain.serve(needed)
        assert step.insert_LE[0].nonzero().flatten().tolist() == sorted(inserted)
        assert step.evict_LE[0].nonzero().flatten().tolist() == sorted(evicted)
        visits = [plain.visits[e] if e in plain.slot_of else 0 for e in range(6)]
        assert cache.usage.visits_LE[0].tolist() == visits


def test_a_prefetched_expert_starts_with_no_visits() -> None:
    cache = ExpertCache(
        make_policy("finemoe"), num_layers=1, num_experts=4, slots=2, with_prefetch=True
    )
    forecast_LE = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    needed = [torch.arange(4)[None] == expert for expert in range(4)]
    for mask_LE in (needed[0], needed[0], needed[1]):
        cache.step(mask_LE, forecast_LE=forecast_LE)
    cache.prefetch(needed[3], forecast_LE, max_fetches=1)
    assert cache.usage.visits_LE.tolist() == [[0, 1, 0, 0]]
    cache.step(needed[3], forecast_LE=forecast_LE)
    assert cache.usage.visits_LE.tolist() == [[0, 1, 0, 1]]


def test_least_stale_with_a_cache_per_layer_is_lru() -> None:
    rnd = random.Random(1)
    events = [set(rnd.sample(range(16), 4)) for _ in range(200)]
    for slots in (4, 9):
        assert hits("least_stale", events, 16, slots) == hits("lru", events, 16, slots)


def test_least_stale_in_a_pool_first_gives_up_what_this_pass_has_passed_over() -> None:
    """Three layers of two experts; the third pass is at layer 1 (step 8)."""
    last_use = (
        *(4, 7),  # layer 0, served: expert 1 in this pass, expert 0 in the one before
        *(5, 8),  # layer 1, being served: it needs expert 3
        *(3, 6),  # layer 2, to come: expert 4 is older than anything else
    )
    past = usage(step=8, last_use=last_use, shape=(1, 6))
    keep_E = LeastStale(num_layers=3).keep_scores(past, None)[0]
    assert keep_E.argsort().tolist() == [0, 2, 4, 5, 1, 3]
    assert order("lru", past) == [4, 0, 2, 5, 1, 3]


def test_least_stale_takes_what_a_prefetch_brings_for_current() -> None:
    past = usage(step=8, last_use=(7, 8, 8, 5), shape=(1, 4))
    assert LeastStale(num_layers=2).keep_scores(past, None)[0].argsort().tolist()[:2] == [3, 0]


def test_least_stale_refuses_a_pool_that_its_layers_do_not_divide() -> None:
    with pytest.raises(ValueError, match="num_layers=0: must be at least 1"):
        LeastStale(num_layers=0)
    with pytest.raises(ValueError, match="num_layers=4 does not divide the pool's 6 experts"):
        LeastStale(num_layers=4).keep_scores(usage(step=1, shape=(1, 6)), None)


def test_random_hits_in_proportion_to_the_room_and_evicts_all_alike() -> None:
    """Uniform requests: a quarter of the room hits a quarter; every slot is given up as often."""
    rnd = random.Random(2)
    events = [{rnd.randrange(16)} for _ in range(4000)]
    cache = ExpertCache(make_policy("random"), num_layers=1, num_experts=16, slots=4)
    victims_of_slot, num_hits = [0] * 4, 0
    for needed in events:
        before_E = cache.slot_of_LE[0].tolist()
        step = cache.step(torch.arange(16)[None] == min(needed), max_needed=1)
        num_hits += int(step.num_hits_L1)
        for expert in step.evict_LE[0].nonzero().flatten().tolist():
            victims_of_slot[before_E[expert]] += 1
    assert num_hits / 4000 == pytest.approx(0.25, abs=0.03)  # 4 standard deviations
    for count in victims_of_slot:
        assert count / sum(victims_of_slot) == pytest.approx(0.25, abs=0.04)


def test_random_draws_anew_at_each_step_and_for_each_seed_but_reproducibly() -> None:
    def draws(seed: int, step: int) -> list[float]:
        past = usage(step=step, shape=(1, 512))
        return Random(seed=seed).keep_scores(past, None)[0].tolist()

    assert draws(0, 7) == draws(0, 7)
    columns = torch.tensor([draws(0, 7), draws(0, 8), draws(1, 7), draws(1, 8), draws(2**20, 7)])
    assert columns.mean(1).tolist() == pytest.approx([0.5] * 5, abs=0.06)  # 4.7 sd
    assert columns.std(1).tolist() == pytest.approx([12**-0.5] * 5, abs=0.04)
    assert columns.corrcoef().fill_diagonal_(0).abs().max() < 0.2
    with pytest.raises(ValueError, match="seed=-1: must not be negative"):
        Random(seed=-1)


@pytest.mark.parametrize("name", ["forecast", "belady"])
def test_forecast_and_belady_evict_the_lowest_forecast(name: str) -> None:
    assert order(name, usage(step=1), torch.tensor([[0.3, 0.1, 0.2]])) == [1, 2, 0]


@pytest.mark.parametrize("name", ["forecast", "finemoe", "belady"])
def test_policies_that_spend_a_forecast_ask_for_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"policy '{name}' needs a forecast"):
        make_policy(name).keep_scores(usage(step=1), None)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_whose_scores_are_forecasts_hands_them_on(name: str) -> None:
    policy, forecast_LE = make_policy(name), torch.tensor([[0.3, 0.1, 0.2]])
    past = usage(step=3, last_use=(1, 2, 3), use_count=(1, 1, 1))
    hands_on = policy.keep_scores(past, forecast_LE) is forecast_LE
    assert hands_on == policy.scores_are_forecasts


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
        for name in ("fifo", "lru", "lfu", "lfru", "lcp", "least_stale", "random"):
            assert hits(name, events, 16, slots) <= belady


def test_an_unknown_policy_lists_what_exists() -> None:
    with pytest.raises(
        ValueError, match=r"'lruu' does not exist; there are fifo, lru, lfu, lfru, lcp"
    ):
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
