"""Stamps of the device's clock: what a step shows of its window is added up in the next."""

import pytest
import torch

from runtime.kernels import clock


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [0, 1])
def test_four_moments_of_a_step_become_a_sample_of_the_next(waits: int) -> None:
    device = torch.device("cuda")
    clock_X = clock.new_clock(device)
    tensors = {
        "allowance_2": torch.tensor([448, 512], dtype=torch.int32, device=device),
        "waits_1": torch.tensor([waits], dtype=torch.int32, device=device),
        "left_1": torch.tensor([192], dtype=torch.int32, device=device),
    }
    busy = torch.randn(2048, 2048, device=device)
    busy @ busy  # loads the library, which takes the host longer than any window
    torch.cuda.synchronize()
    for _ in range(3):
        clock.stamp(clock_X, clock.STARTED, **tensors)
        clock.stamp(clock_X, clock.COMPUTED, **tensors)
        busy @ busy
        clock.stamp(clock_X, clock.COPIED, **tensors)
        clock.stamp(clock_X, clock.ARRIVED, **tensors)
    values = clock_X.tolist()
    assert values[clock.SAMPLES] == 2
    assert values[clock.COPIED_NEURONS] == 2 * (256 if waits else 320)
    assert 0 < values[clock.COPYING_NS] < 1e9
    assert 0 < values[clock.LEAST_REST_NS] <= values[clock.COPYING_NS] / 2
    assert (values[clock.LEAST_WINDOW_NS] == clock.UNSEEN_NS) == bool(waits)
    assert values[clock.LATE_NS] == 0
    clock.forget_samples(clock_X)
    assert clock_X[clock.SAMPLES] == 0
    assert clock_X[clock.LEAST_WINDOW_NS] == clock_X[clock.LEAST_REST_NS] == clock.UNSEEN_NS
