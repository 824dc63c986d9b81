"""Rates from timings; what cannot be measured is not invented."""

import time

import pytest
import torch

from runtime.link import LinkRates, fit_link, measure_link, seconds_of

CPU = torch.device("cpu")
SIZES = [2**16, 2**20, 2**24, 2**26]


def test_rate_and_latency_come_back_from_ideal_timings() -> None:
    truth = LinkRates(bytes_per_s=50e9, latency_s=8e-6)
    fitted = fit_link({size: truth.copy_s(size) for size in SIZES}, pinned=False)
    assert fitted.bytes_per_s == pytest.approx(50e9, rel=1e-6)
    assert fitted.latency_s == pytest.approx(8e-6, rel=1e-3)
    assert not fitted.pinned


def test_noise_between_the_largest_sizes_does_not_make_a_rate_up() -> None:
    truth = LinkRates(bytes_per_s=50e9, latency_s=8e-6)
    noisy = {size: truth.copy_s(size) for size in SIZES}
    noisy[2**24] = 0.99 * noisy[2**26]
    assert fit_link(noisy).bytes_per_s <= 1.1 * 50e9
    noisy[2**24] = 1.01 * noisy[2**26]
    assert fit_link(noisy).bytes_per_s == pytest.approx(50e9, rel=0.01)


def test_copies_one_after_the_other_cost_their_latencies_and_their_bytes() -> None:
    rates = LinkRates(bytes_per_s=10.0, latency_s=0.5)
    assert rates.copy_s(20) == 2.5
    assert rates.copy_s(20, copies=3) == 3.5


@pytest.mark.parametrize(
    "values", [{"bytes_per_s": 0.0}, {"bytes_per_s": 1.0, "latency_s": -1.0}], ids=str
)
def test_impossible_rates_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=list(values)[-1]):
        LinkRates(**values)
    with pytest.raises(ValueError, match="two sizes"):
        fit_link({1: 1.0})


def test_without_a_gpu_nothing_is_measured() -> None:
    assert measure_link("cpu") is None


def test_the_first_call_is_not_timed() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(0)
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    assert 0.001 <= seconds_of(run, CPU) < 0.04
    assert len(calls) == 4


@pytest.mark.gpu
def test_a_gpu_is_measured_in_about_two_seconds() -> None:
    report = measure_link("cuda")
    assert report is not None
    assert report.spent_s < 4  # the first use of the device and of the kernel included
    assert report.engine.pinned
    assert report.engine.bytes_per_s > max(report.pageable_bytes_per_s.values())
    assert report.device_bytes_per_s > report.engine.bytes_per_s
