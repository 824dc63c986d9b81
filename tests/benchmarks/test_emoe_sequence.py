"""What the benchmark compares: nobody sees the judged request, or one after it."""

import numpy as np
import pytest
import torch

from benchmarks.emoe_sequence import Requests, Windowed, make_stream, overlap

NUMBERED = Requests(
    "numbered",
    (torch.arange(60)[:, None, None] / 100).expand(-1, 2, 4),
    [f"s{n // 5}" for n in range(60)],
    1,
)


def numbers(use_NLE: torch.Tensor) -> list[int]:
    return (100 * use_NLE[..., 0, 0]).round().int().tolist()


@pytest.mark.parametrize("order", ["subjects", "mixed"])
@pytest.mark.parametrize("split_by", ["request", "topic"])
@pytest.mark.parametrize("period", [1, 3])
def test_a_window_holds_what_arrived_before(order: str, split_by: str, period: int) -> None:
    stream = make_stream(NUMBERED, order=order, split_by=split_by, seed=1)
    assert sorted(numbers(stream.use_NLE)) == list(range(60))
    windowed = Windowed(stream, stream.test, split_by=split_by, period=period)
    first = 0 if split_by == "request" else int(stream.test[0])
    arrived = numbers(stream.use_NLE)
    for n, window in zip(stream.test, windowed.last(4, torch.full((2, 4), 0.99)), strict=True):
        known = [number for number in numbers(window) if number != 99]
        made_at = next(end for end in range(n, -1, -1) if arrived[end - len(known) : end] == known)
        assert first <= made_at <= n
        assert n - made_at < period
        assert len(known) == min(4, made_at - first)


def test_splitting_by_topic_keeps_test_subjects_apart() -> None:
    stream = make_stream(NUMBERED, order="mixed", split_by="topic", seed=0)
    of = [{stream.subjects[n] for n in rows} for rows in (stream.fit, stream.val, stream.test)]
    assert not of[0] & of[2]
    assert not of[1] & of[2]


def test_bags_sum_the_last_requests_or_all() -> None:
    stream = make_stream(NUMBERED, order="subjects", split_by="request", seed=0)
    windowed = Windowed(stream, np.array([0, 1, 6]), split_by="request", period=1)
    missing = torch.full((2, 4), 0.5)
    assert numbers(windowed.counts(2, missing)) == [50, 0, 4 + 5]
    assert numbers(windowed.counts(None, missing)) == [50, 0, 0 + 1 + 2 + 3 + 4 + 5]


def test_overlap_is_the_share_of_the_most_used_that_was_named() -> None:
    said = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    assert overlap(said, torch.tensor([[[0.0, 0.9, 0.8, 0.1]]]), 2) == 0.5
    assert overlap(said, said, 2) == 1.0
