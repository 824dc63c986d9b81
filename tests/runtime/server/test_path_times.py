"""Which way of running is measured, and what follows from it."""

from typing import Any

import pytest

from runtime.server import path_times
from runtime.server.path_times import PathTimes, time_paths


@pytest.mark.parametrize(("max_batch", "expected"), [(1, 1), (3, 3), (4, 4), (16, 4)])
def test_no_more_are_measured_than_run_at_once(
    monkeypatch: pytest.MonkeyPatch, max_batch: int, expected: int
) -> None:
    sizes: list[int] = []

    def time_batch(batch: Any, size: int, *args: Any) -> float:
        sizes.append(size)
        return 1.0

    monkeypatch.setattr(path_times, "time_single", lambda *args: 1.0)
    monkeypatch.setattr(path_times, "time_batch", time_batch)
    unused: Any = None
    times = time_paths(unused, unused, unused, unused, max_batch=max_batch)
    assert sizes == [1, expected]
    assert times.several == expected
    assert f"as a batch of {expected}" in str(times)


@pytest.mark.parametrize(("several", "pays"), [(4, True), (3, False), (2, False)])
def test_a_batch_pays_by_the_number_that_it_is_of(several: int, pays: bool) -> None:
    """A step of 3 s is less than 4 steps of 1 s each, and no less than 3 or 2."""
    assert PathTimes(1.0, 1.5, 3.0, several).batching_pays == pays
