"""What is set about prefetching, and what follows from it."""

import math

import pytest

from runtime.prefetch.options import PrefetchOptions, allowance_neurons, least_probability


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("layers_ahead", 0), ("max_fetches", 0), ("review_tokens", 0), ("margin", -0.1)),
        *(("margin", 1.0), ("displaced_use", 1.5), ("window_s", -1.0), ("share", 0.0)),
        *(("into", "cache"), ("landing_records", 0)),
        *(("link_bytes_per_s", 0.0), ("waste_cost", -1.0), ("programs_per_record", 0)),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PrefetchOptions(**{name: value})


def test_an_allowance_is_what_fits_in_whole_chunks() -> None:
    """gpt-oss-20b: 2880 neurons of 17,290 bytes, 0.2 ms, 51 GB/s."""
    neurons_per_s = 51e9 / (49_800_960 / 2880)
    allowance = allowance_neurons(window_s=200e-6, neurons_per_s=neurons_per_s, share=0.9)
    assert allowance == 512  # of 530
    assert allowance_neurons(window_s=10e-6, neurons_per_s=neurons_per_s, share=1.0) == 0


def test_the_less_a_window_brings_the_surer_a_prefetch_must_be() -> None:
    def least(allowance: int) -> float:
        return least_probability(allowance=allowance, num_neurons=2880, displaced_use=0.15)

    assert least(0) == math.inf
    assert least(64) > least(576) > least(2880) == least(9999)
    # Where it begins to pay, what is saved equals what is lost.
    p = least(576)
    assert p * 576 / 2880 == pytest.approx((1 - p) * 0.15)
    assert least_probability(allowance=64, num_neurons=2880, displaced_use=0.0) == 0
