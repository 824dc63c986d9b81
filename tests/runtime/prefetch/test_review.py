"""Whether prefetching pays is judged from counters, and told to the device without waiting."""

import logging
import math

import pytest
import torch

from runtime.device_cache import COUNTERS
from runtime.kernels import clock
from runtime.policies import make_policy
from runtime.prefetch.options import PrefetchOptions, least_probability
from runtime.prefetch.review import Review
from tests.devices import KERNEL_DEVICE
from tests.runtime.device_caches import F, make


def review_of(**given):
    cache = make(
        make_policy("lru"), slots=[2, 2], num_experts=4, top_k=1, kernels=False, with_prefetch=True
    )
    given_options = {"into": "slots", "window_s": 1e-3, "share": 1.0, "review_tokens": 2}
    options = PrefetchOptions(**{**given_options, **given.pop("options", {})})
    return cache, Review(cache=cache, options=options, neurons_per_s=128e3, **given)


def count(cache, layer: int, **amounts: int) -> None:
    for name, amount in amounts.items():
        cache.counters_LX[layer, COUNTERS.index(name)] += amount


def test_it_starts_with_what_is_set() -> None:
    _, review = review_of()
    assert review.allowance == 128
    assert review.allowance_2.tolist() == [128, 128]
    least = least_probability(allowance=128, num_neurons=F, displaced_use=0.15)
    assert review.least_L.tolist() == pytest.approx([least] * 2)
    _, narrow = review_of(options={"window_s": 1e-5})
    assert narrow.allowance_2.tolist() == [0, 0]
    assert narrow.least_L.tolist() == [math.inf] * 2


def test_a_layer_is_off_once_it_has_lost_for_certain(caplog: pytest.LogCaptureFixture) -> None:
    cache, review = review_of()
    count(cache, 0, used_neurons=F, regretted=1)  # no loss
    count(cache, 1, wasted_neurons=F)  # a loss, on too little to judge by
    review.look_now()
    assert review.layers_off == set()
    count(cache, 0, used_neurons=F, regretted=2)
    count(cache, 1, used_neurons=10 * F, regretted=3)
    with caplog.at_level(logging.WARNING):
        review.look_now()
        review.look_now()
    assert review.layers_off == {0}
    assert review.least_L.isinf().tolist() == [True, False]
    assert len(caplog.records) == 1, "said once"


def test_waste_alone_costs_little_but_not_nothing() -> None:
    cache, review = review_of(options={"waste_cost": 0.1})
    count(cache, 0, wasted_neurons=9 * F, used_neurons=F)
    count(cache, 1, wasted_neurons=11 * F, used_neurons=F)
    review.look_now()
    assert review.layers_off == {1}


def test_what_is_long_past_counts_less() -> None:
    cache, review = review_of()
    count(cache, 0, used_neurons=64 * F)
    review.look_now()
    for _ in range(9):
        count(cache, 0, regretted=3)
        review.look_now()
    assert review.layers_off == {0}


def test_it_looks_every_so_many_passes() -> None:
    cache, review = review_of()
    count(cache, 0, regretted=4)
    for _ in range(2):
        review.after_pass()
    assert review.layers_off == set(), "the counters are on their way"
    if KERNEL_DEVICE == "cuda":
        torch.cuda.synchronize()
    review.after_pass()
    assert review.layers_off == {0}


def test_windows_and_rates_that_are_measured_make_the_allowance() -> None:
    clock_X = clock.new_clock(torch.device(KERNEL_DEVICE))
    _, review = review_of(clock_X=clock_X)
    review.look_now()
    assert review.allowance == 128, "no sample yet"
    clock_X[clock.SAMPLES] = 10
    clock_X[clock.LEAST_REST_NS] = 200_000
    review.look_now()
    assert review.allowance == 0, "0.2 ms at 128 neurons a ms, and no event without a miss"
    assert clock_X[clock.LEAST_REST_NS] == clock.UNSEEN_NS
    clock_X[clock.SAMPLES] = 10
    clock_X[clock.LEAST_REST_NS], clock_X[clock.LEAST_WINDOW_NS] = 100_000, 200_000
    clock_X[clock.COPYING_NS], clock_X[clock.COPIED_NEURONS] = 1_000_000, 1_000
    review.look_now()
    assert review.allowance == 192  # of 200
    assert review.allowance_2.tolist() == [64, 192]
    review.reset()
    assert review.allowance == 192, "what is measured stays"


def test_what_lands_displaces_nothing_and_may_be_less_sure() -> None:
    _, review = review_of(options={"into": "landing", "waste_cost": 0.25}, max_neurons=64)
    assert review.least_L.tolist() == pytest.approx([0.2] * 2)
    assert review.allowance_2.tolist() == [64, 64]


def test_what_gains_less_than_its_launches_take_is_off_as_a_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = []
    cache, review = review_of(options={"launch_s": 1e-3})  # 128 neurons, in each of 2 layers
    review.on_change = lambda: changed.append(review.is_off)

    def serve_four(used_neurons: int) -> None:
        for _ in range(4):
            count(cache, 0, used_neurons=used_neurons)
            review.after_pass()
        review.look_now()

    serve_four(300)
    assert (review.is_off, review.num_off) == (False, 0)
    for _ in range(4):
        serve_four(200)
    assert (review.is_off, review.num_off, changed) == (True, 2, [True])
    assert caplog.text.count("its launches take as long") == 1
    serve_four(0)
    assert changed == [True], "said once"
    cache.reset()
    review.reset()
    assert (review.is_off, review.num_off, changed) == (False, 0, [True, False])
