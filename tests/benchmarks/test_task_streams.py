"""Streams are drawn as they are called, and nobody is asked twice."""

from collections import Counter

import pytest

from benchmarks.task_streams import StreamOptions, arrange


def test_a_mixed_stream_draws_each_task_anew_and_one_in_runs_stays() -> None:
    sizes = {"a": 200, "b": 200}

    def changes(stay: float) -> int:
        drawn = arrange(sizes, 300, stay=stay, seed=0)
        return sum(one != next_one for one, next_one in zip(drawn, drawn[1:], strict=False))

    assert 120 < changes(0.0) < 180
    assert 5 < changes(0.9) < 30  # where it does not stay it may draw the same again


def test_no_request_is_asked_twice() -> None:
    drawn = arrange({"a": 3, "b": 7}, 10, stay=0.5, seed=1)
    assert Counter(drawn) == {"a": 3, "b": 7}
    with pytest.raises(ValueError, match="num_requests=11: there are 10"):
        arrange({"a": 3, "b": 7}, 11, stay=0.5, seed=1)


def test_a_stream_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arrivals=\['sorted'\]"):
        StreamOptions(arrivals=("mixed", "sorted"))
