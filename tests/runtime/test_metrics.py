import pytest
import torch

from runtime.cache import ExpertCache
from runtime.metrics import Clock, Counters, gap_closed, ratio
from runtime.policies import make_policy


def mask(*experts: int) -> torch.Tensor:
    mask_E = torch.zeros(6, dtype=torch.bool)
    mask_E[list(experts)] = True
    return mask_E


def test_counters_tell_demand_from_prefetch_and_what_was_wasted() -> None:
    cache = ExpertCache(
        make_policy("lru"), num_layers=2, num_experts=6, slots=2, with_prefetch=True
    )
    counters = Counters(2)
    counters.add(cache.step(mask(0), layer=1), layer=1)
    counters.add_prefetch(cache.prefetch(mask(4), torch.ones(6), layer=1, max_fetches=1), layer=1)
    counters.add(cache.step(mask(0, 1), layer=1), layer=1)
    counters.add(cache.step(mask(0, 1, 2), layer=1), layer=1)
    assert counters.accesses_L.tolist() == [0, 6]
    assert counters.hits_L.tolist() == [0, 3]
    assert counters.misses_L.tolist() == [0, 3]
    assert counters.streamed_L.tolist() == [0, 1]
    assert counters.prefetches_L.tolist() == [0, 1]
    assert counters.evictions_L.tolist() == counters.wasted_L.tolist() == [0, 1]


def test_the_gap_runs_from_lfru_to_belady_and_beyond() -> None:
    assert gap_closed(15, lfru_hits=10, belady_hits=20) == 0.5
    assert gap_closed(5, lfru_hits=10, belady_hits=20) == -0.5
    assert gap_closed(10, lfru_hits=10, belady_hits=10) is None
    assert ratio(0, 0) is None


def test_the_bound_is_the_longer_of_compute_and_link_and_serial_their_sum() -> None:
    clock = Clock(link_bytes_per_s=100.0, compute_s_per_layer=0.5, link_latency_s=0.25)
    load = {"layer_calls": 4, "misses": 2, "miss_bytes": 300}
    assert clock.serial_s(**load) == 4 * 0.5 + 2 * 0.25 + 3.0
    assert clock.bound_s(**load) == 3.5
    assert clock.bound_s(**{**load, "miss_bytes": 0}) == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("link_bytes_per_s", 0.0), ("compute_s_per_layer", -1.0), ("link_latency_s", -1.0)],
)
def test_a_clock_names_the_rate_that_cannot_be(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: must"):
        Clock(**{"link_bytes_per_s": 1.0, field: value})
