import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cache import KEEP, ReferenceCache, next_uses
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.cache import Event, ExpertCache
from runtime.metrics import Counters
from runtime.policies import POLICIES, make_policy

NUM_EXPERTS = 8


def mask(*experts: int, num_experts: int = NUM_EXPERTS) -> torch.Tensor:
    mask_E = torch.zeros(num_experts, dtype=torch.bool)
    mask_E[list(experts)] = True
    return mask_E


def ids(mask_E: torch.Tensor) -> set[int]:
    return set(mask_E.nonzero().flatten().tolist())


def lru_cache(slots: int = 3, **kwargs) -> ExpertCache:
    return ExpertCache(
        make_policy("lru"), num_layers=1, num_experts=NUM_EXPERTS, slots=slots, **kwargs
    )


def serve(cache: ExpertCache, *experts: int):
    return cache.step(mask(*experts), layer=0)


def slots_of(cache: ExpertCache, layer: int = 0) -> dict[int, int]:
    return {e: slot for e, slot in enumerate(cache.slot_of_LE[layer].tolist()) if slot >= 0}


# What one step does


def test_newcomers_take_free_slots_in_the_order_of_their_ids() -> None:
    cache = lru_cache(slots=4)
    serve(cache, 6, 2)
    serve(cache, 1)
    assert slots_of(cache) == {2: 0, 6: 1, 1: 2}


def test_a_victims_slot_goes_to_the_newcomer_paired_by_ascending_id() -> None:
    cache = lru_cache(slots=3)
    serve(cache, 7, 5, 3)
    step = serve(cache, 0, 5, 6)
    assert (ids(step.evict_LE), ids(step.insert_LE)) == ({3, 7}, {0, 6})
    assert slots_of(cache) == {5: 1, 0: 0, 6: 2}


def test_hits_are_counted_before_anything_moves() -> None:
    cache = lru_cache(slots=2)
    serve(cache, 0, 1)
    step = serve(cache, 1, 2)
    assert ids(step.hit_LE) == {1}
    assert ids(step.insert_LE) == {2}
    assert ids(step.evict_LE) == {0}


def test_what_an_event_needs_is_protected_even_if_it_is_the_oldest() -> None:
    cache = lru_cache(slots=2)
    serve(cache, 0)
    serve(cache, 1)
    assert ids(serve(cache, 0, 2).evict_LE) == {1}


def test_what_does_not_fit_is_streamed_from_the_highest_ids() -> None:
    cache = lru_cache(slots=2)
    serve(cache, 7)
    step = serve(cache, 1, 4, 5, 7)
    assert ids(step.hit_LE) == {7}
    assert ids(step.insert_LE) == {1}
    assert ids(step.streamed_LE) == {4, 5}
    assert ids(cache.usage.resident_LE[0]) == {1, 7}


def test_equal_keep_scores_evict_the_lowest_expert_id() -> None:
    cache = lru_cache(slots=3)
    serve(cache, 4, 2, 6)
    assert ids(serve(cache, 0).evict_LE) == {2}


def test_zero_and_minus_zero_tie() -> None:
    """The sort key compares bit patterns, where -0.0 would lie below 0.0."""
    cache = ExpertCache(
        make_policy("forecast"), num_layers=1, num_experts=NUM_EXPERTS, slots=2, with_slots=False
    )
    forecast_E = torch.tensor([0.0, -0.0] + [1.0] * 6)
    cache.step(mask(0, 1), layer=0, forecast_LE=forecast_E)
    assert ids(cache.step(mask(2), layer=0, forecast_LE=forecast_E).evict_LE) == {0}


def test_keep_scores_order_through_zero_and_infinity() -> None:
    cache = ExpertCache(make_policy("forecast"), num_layers=1, num_experts=9, slots=5)
    scores = [1e-30, -math.inf, math.inf, -2.5, -1e-30] + [math.inf] * 4
    evicted = []
    for needed in ((0, 1, 2, 3, 4), (5,), (6,), (7,), (8,)):
        step = cache.step(mask(*needed, num_experts=9), layer=0, forecast_LE=torch.tensor(scores))
        evicted += ids(step.evict_LE)
    assert evicted == [1, 3, 4, 0]


def test_layers_step_alone_as_they_do_together() -> None:
    rnd = random.Random(0)
    together = ExpertCache(make_policy("lfru"), num_layers=3, num_experts=NUM_EXPERTS, slots=3)
    alone = ExpertCache(make_policy("lfru"), num_layers=3, num_experts=NUM_EXPERTS, slots=3)
    for _ in range(50):
        needed_LE = torch.stack([mask(*rnd.sample(range(NUM_EXPERTS), 2)) for _ in range(3)])
        step = together.step(needed_LE)
        for layer in range(3):
            one = alone.step(needed_LE[layer], layer=layer)
            assert torch.equal(one.evict_LE, step.evict_LE[layer])
        assert torch.equal(together.slot_of_LE, alone.slot_of_LE)
    together.check_integrity()


def test_layers_may_have_different_numbers_of_slots() -> None:
    cache = ExpertCache(
        make_policy("lru"), num_layers=2, num_experts=NUM_EXPERTS, slots=torch.tensor([1, 3])
    )
    for experts in ((0, 1), (2, 3), (4, 5)):
        cache.step(torch.stack([mask(*experts)] * 2))
    assert cache.used_L1.flatten().tolist() == [1, 3]
    cache.check_integrity()


def test_reset_forgets_everything() -> None:
    fresh, used = lru_cache(with_prefetch=True), lru_cache(with_prefetch=True)
    serve(used, 1, 2, 3)
    used.prefetch(mask(5), torch.ones(NUM_EXPERTS), layer=0, max_fetches=1)
    used.reset()
    used.check_integrity()
    for experts in ((0, 1), (5, 6), (1, 2)):
        for mine, theirs in zip(serve(fresh, *experts), serve(used, *experts), strict=True):
            assert torch.equal(mine, theirs)


# Against a cache written in plain Python


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_tensor_program_equals_a_plain_cache(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    in_bytes = data.draw(st.booleans())
    events = data.draw(
        st.lists(st.sets(st.integers(0, num_experts - 1)), min_size=1, max_size=12), "events"
    )
    name = data.draw(st.sampled_from(sorted(KEEP)))
    sizes = [1] * num_experts
    if in_bytes:
        sizes = data.draw(st.lists(st.integers(1, 5), min_size=num_experts, max_size=num_experts))
    capacity = data.draw(st.integers(min(sizes), sum(sizes)), "capacity")
    forecasts = next_uses(events, num_experts)
    reference = ReferenceCache(KEEP[name], capacity, sizes)
    budget = (
        {"budget_bytes": capacity, "expert_bytes_LE": torch.tensor([sizes]), "with_slots": False}
        if in_bytes
        else {"slots": capacity}
    )
    cache = ExpertCache(make_policy(name), num_layers=1, num_experts=num_experts, **budget)
    for needed, forecast in zip(events, forecasts, strict=True):
        reference.forecast = forecast
        expected = reference.serve(needed)
        step = cache.step(
            mask(*needed, num_experts=num_experts)[None],
            forecast_LE=torch.tensor([forecast]),
            max_needed=data.draw(st.integers(max(1, len(needed)), num_experts)),
        )
        hit, insert, evict, streamed = (ids(m[0]) for m in step[:4])
        assert (hit, insert, evict, streamed) == expected
        assert not evict & needed
        if not in_bytes:
            assert slots_of(cache) == reference.slot_of
        cache.check_integrity()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=20),
    st.lists(st.integers(3, 8), min_size=1, max_size=3),
)
def test_variants_side_by_side_equal_caches_alone(events: list[set[int]], slots: list[int]) -> None:
    together = ExpertCache(
        make_policy("lru"),
        num_layers=1,
        num_experts=NUM_EXPERTS,
        slots=torch.tensor(slots)[:, None],
        variants=(len(slots),),
        max_needed=3,
    )
    alone = [lru_cache(count) for count in slots]
    for needed in events:
        step = together.step(mask(*needed)[None])
        for variant, cache in enumerate(alone):
            assert torch.equal(serve(cache, *needed).evict_LE, step.evict_LE[variant, 0])
    together.check_integrity()
    assert torch.equal(together.slot_of_LE, torch.stack([cache.slot_of_LE for cache in alone]))


# What a captured graph demands


class NoHostReads(TorchDispatchMode):
    """Refuses what a captured CUDA graph cannot hold: values read, or made, by the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or (name == "index" and args[1][0].dtype == torch.bool):
            raise AssertionError(f"{func} reads or makes values on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_step_reads_no_value_and_keeps_every_address(name: str, in_bytes: bool) -> None:
    sizes_LE = torch.tensor([[3] * NUM_EXPERTS, [2] * NUM_EXPERTS])
    budget = (
        {"budget_bytes": 9, "expert_bytes_LE": sizes_LE, "with_slots": False}
        if in_bytes
        else {"slots": 3, "with_prefetch": True}
    )
    cache = ExpertCache(make_policy(name), num_layers=2, num_experts=NUM_EXPERTS, **budget)
    counters = Counters(2)
    usage = cache.usage
    state = [usage.resident_LE, usage.last_use_LE, usage.inserted_LE, usage.visits_LE]
    state.append(cache.used_L1)
    addresses = [tensor.data_ptr() for tensor in state]
    needed_LE = torch.stack([mask(0, 1, 2, 5)] * 2)
    forecast_LE = torch.rand(2, NUM_EXPERTS)
    with NoHostReads():
        for _ in range(3):
            counters.add(cache.step(needed_LE, forecast_LE=forecast_LE))
            step = cache.step(needed_LE[1], layer=1, forecast_LE=forecast_LE[1], max_needed=4)
            counters.add(step, layer=1)
            if not in_bytes:
                counters.add_prefetch(
                    cache.prefetch(needed_LE[0], forecast_LE[0], layer=0, max_fetches=2), layer=0
                )
    assert [tensor.data_ptr() for tensor in state] == addresses
    assert counters.accesses_L.tolist() == [12, 24]
    assert counters.hits_L.sum() > 0
    cache.check_integrity()


def test_the_check_for_host_reads_can_fail() -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="on the host"):
        mask(1).any().item()


# Prefetch


def prefetch(cache: ExpertCache, forecast: dict[int, float], want: set[int], **kwargs):
    forecast_E = torch.tensor([forecast.get(e, 0.0) for e in range(NUM_EXPERTS)])
    kwargs = {"max_fetches": 2, **kwargs}
    return cache.prefetch(mask(*want), forecast_E, layer=0, **kwargs)


def test_a_prefetch_takes_free_slots_first() -> None:
    cache = lru_cache(slots=3, with_prefetch=True)
    serve(cache, 0, 1)
    step = prefetch(cache, {0: 0.9, 1: 0.1, 4: 0.5, 5: 0.3}, want={4, 5})
    assert ids(step.insert_LE) == {4, 5}
    assert ids(step.evict_LE) == {1}
    assert slots_of(cache) == {0: 0, 4: 2, 5: 1}
    cache.check_integrity()


def test_a_prefetch_evicts_only_what_it_beats_by_the_margin() -> None:
    for margin, expected in ((0.3, set()), (0.1, {4})):
        cache = lru_cache(slots=2, with_prefetch=True)
        serve(cache, 0, 1)
        step = prefetch(cache, {0: 0.9, 1: 0.2, 4: 0.4}, want={4}, margin=margin)
        assert ids(step.insert_LE) == expected


def test_a_prefetch_never_evicts_a_protected_expert() -> None:
    cache = lru_cache(slots=2, with_prefetch=True)
    serve(cache, 0, 1)
    step = prefetch(cache, {4: 0.5, 5: 0.6}, want={4, 5}, protected_LE=mask(0, 1))
    assert not step.insert_LE.any()
    step = prefetch(cache, {4: 0.5, 5: 0.6}, want={4, 5}, protected_LE=mask(0))
    assert (ids(step.insert_LE), ids(step.evict_LE)) == ({5}, {1})


def test_a_prefetch_leaves_residents_alone_and_fetches_no_more_than_it_may() -> None:
    cache = lru_cache(slots=8, with_prefetch=True)
    serve(cache, 0)
    step = prefetch(cache, {0: 1.0, 1: 0.1, 2: 0.2, 3: 0.3}, want={0, 1, 2, 3}, max_fetches=2)
    assert ids(step.insert_LE) == {2, 3}


def test_an_unused_prefetch_is_wasted_when_it_goes_and_a_used_one_is_not() -> None:
    cache = lru_cache(slots=2, with_prefetch=True)
    prefetch(cache, {4: 0.5, 5: 0.5}, want={4, 5})
    assert ids(serve(cache, 4).hit_LE) == {4}
    step = serve(cache, 0, 1)
    assert (ids(step.evict_LE), ids(step.wasted_LE)) == ({4, 5}, {5})


def test_a_fresh_prefetch_is_not_the_next_demands_first_victim() -> None:
    """It has no use yet; counted as never used, it would go before it could prove itself."""
    cache = lru_cache(slots=2, with_prefetch=True)
    serve(cache, 0)
    serve(cache, 1)
    prefetch(cache, {4: 0.5, 1: 0.9}, want={4})
    assert ids(serve(cache, 6).evict_LE) == {1}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_prefetch_and_demand_in_any_order_keep_the_books_balanced(data: st.DataObject) -> None:
    cache = lru_cache(slots=data.draw(st.integers(1, 8)), with_prefetch=True)
    some_experts = st.sets(st.integers(0, NUM_EXPERTS - 1))
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            needed = data.draw(some_experts)
            step = serve(cache, *needed)
            assert not ids(step.evict_LE) & needed
        else:
            protected = data.draw(some_experts)
            forecasts = data.draw(st.lists(st.integers(0, 3), min_size=8, max_size=8))
            forecast = dict(enumerate(map(float, forecasts)))
            before = ids(cache.usage.resident_LE[0])
            step = prefetch(
                cache,
                forecast,
                want=data.draw(some_experts),
                max_fetches=data.draw(st.integers(1, 8)),
                protected_LE=mask(*protected),
            )
            came, went = ids(step.insert_LE), ids(step.evict_LE)
            assert not came & before
            assert not went & protected
            if went:  # every newcomer beyond the free slots beat a victim
                newcomers = sorted((forecast[e] for e in came), reverse=True)[-len(went) :]
                victims = sorted(forecast[e] for e in went)
                assert all(a > b for a, b in zip(newcomers, victims, strict=True))
        cache.check_integrity()


# The log


def test_the_log_tells_one_step_in_a_fixed_order() -> None:
    cache = lru_cache(slots=2, record_events=True)
    serve(cache, 0, 1)
    serve(cache, 5, 1, 7)
    assert cache.events == [
        Event(1, 0, "miss", 0),
        Event(1, 0, "miss", 1),
        Event(2, 0, "hit", 1),
        Event(2, 0, "miss", 5),
        Event(2, 0, "miss", 7),
        Event(2, 0, "evict", 0),
        Event(2, 0, "streamed", 7),
    ]


def test_the_log_is_the_same_for_layers_together_and_alone() -> None:
    def cache() -> ExpertCache:
        return ExpertCache(
            make_policy("lru"), num_layers=2, num_experts=4, slots=2, record_events=True
        )

    together, alone = cache(), cache()
    for experts in ((0, 1), (1, 2), (3, 0)):
        needed_LE = torch.stack([mask(*experts, num_experts=4)] * 2)
        together.step(needed_LE)
        for layer in range(2):
            alone.step(needed_LE[layer], layer=layer)
    assert together.events == alone.events


def test_the_log_has_prefetches_and_what_they_waste() -> None:
    cache = lru_cache(slots=1, with_prefetch=True, record_events=True)
    prefetch(cache, {4: 0.5}, want={4})
    serve(cache, 0)
    assert [(event.kind, event.expert) for event in cache.events] == [
        ("prefetch", 4),
        ("miss", 0),
        ("evict", 4),
        ("wasted", 4),
    ]


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "slots=0: must be in 1..8"),
        ({"slots": 9}, "slots=9: must be in 1..8"),
        ({}, "either slots or budget_bytes"),
        ({"slots": 2, "budget_bytes": 2}, "either slots or budget_bytes"),
        ({"budget_bytes": 100}, "expert_bytes_LE goes with budget_bytes"),
        ({"budget_bytes": 1, "expert_bytes_LE": torch.full((1, 8), 2)}, "with_slots must be False"),
        (
            {"budget_bytes": 1, "expert_bytes_LE": torch.full((1, 8), 2), "with_slots": False},
            "one expert must fit",
        ),
        ({"slots": 2, "num_layers": 0}, "at least 1 layer"),
        ({"slots": 2, "variants": (2,), "record_events": True}, "recorded for one cache only"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertCache(make_policy("lru"), **{"num_layers": 1, "num_experts": 8, **arguments})


def test_prefetch_needs_a_cache_that_tracks_it() -> None:
    with pytest.raises(ValueError, match="with_prefetch=True"):
        prefetch(lru_cache(), {}, want={1})


def test_integrity_check_notices_a_stolen_slot() -> None:
    cache = lru_cache()
    serve(cache, 0, 1)
    cache.slot_of_LE[0, 0] = 1
    with pytest.raises(AssertionError, match=r"slots 0\.\.n-1"):
        cache.check_integrity()
