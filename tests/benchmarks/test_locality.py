"""Figures that can be counted by hand, and shuffles that lose nothing."""

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.locality import locality, shuffled
from data.schema import MoESpec, Trace, TraceList


def traces(*requests: Sequence[Sequence[int]], num_experts: int = 4) -> TraceList:
    """One layer; each request is [T][K] expert ids."""
    arrays = [np.asarray(request, np.uint8)[:, None] for request in requests]
    return TraceList(
        spec=MoESpec(
            model_id="test",
            num_experts=num_experts,
            top_k=arrays[0].shape[-1],
            decoder_layers=(0,),
            expert_bytes_per_layer=None,
        ),
        traces=[
            Trace(
                request_id=str(i),
                source="test",
                topic="",
                topk_expert_ids_TLK=ids_TLK,
                num_prompt_tokens=0,
                first_routed_position=0,
            )
            for i, ids_TLK in enumerate(arrays)
        ],
        split={},
        digest="test",
    )


def test_recency_is_counted_within_requests() -> None:
    # Uses of 0 after 1 token and of 1 after 3; what the second request uses is new to it.
    found = locality(traces([[0, 1], [0, 2], [3, 2], [1, 3]], [[0, 1]]), [2], max_tokens=99)
    assert found["overlap"] == pytest.approx((1 + 1 + 1) / 3 / 2)
    # Ten uses: three one token after the last, one three tokens after it, the others first.
    assert found["reused_within"] == {"1": 0.3, "4": 0.4, "16": 0.4, "64": 0.4}
    assert found["tokens_per_request"] == 2.5


def test_chance_overlap_is_what_independent_tokens_of_these_popularities_have() -> None:
    rng = np.random.default_rng(0)
    popularity = np.array([0.5, 0.3, 0.15, 0.05])
    tokens = [[int(rng.choice(4, p=popularity))] for _ in range(4000)]
    found = locality(traces(tokens), [1], max_tokens=4000)
    assert found["overlap_by_chance"] == pytest.approx((popularity**2).sum(), abs=0.02)
    assert found["overlap"] == pytest.approx(found["overlap_by_chance"], abs=0.03)


def test_a_fixed_cache_is_filled_from_even_tokens_and_judged_on_odd_ones() -> None:
    # Popular over all even tokens is 0; request 1 lives on expert 2, and its odd tokens prove it.
    requests = ([[0], [0], [0], [1]], [[2], [2], [2], [2]], [[0], [3], [0], [0]])
    found = locality(traces(*requests), [1], max_tokens=99)["fixed_hit"]["1"]
    assert found["all"] == pytest.approx(2 / 6)
    assert found["request"] == pytest.approx(4 / 6)


def test_only_the_first_tokens_count() -> None:
    whole = traces([[0, 1], [0, 2]], [[3, 1], [3, 1]])
    cut = traces([[0, 1], [0, 2]], [[3, 1]])
    assert locality(whole, [2], max_tokens=3) == locality(cut, [2], max_tokens=99)


@pytest.mark.parametrize("across", [False, True])
def test_a_shuffle_keeps_every_token_and_the_length_of_every_request(across: bool) -> None:
    rng = np.random.default_rng(1)
    requests = [rng.integers(0, 4, (length, 2)) for length in (30, 1, 50, 40)]
    original = traces(*requests)
    mixed = shuffled(original, 0, across=across, max_tokens=100)
    assert [trace.num_tokens for trace in mixed.traces] == [30, 1, 50, 19]

    def tokens(some: Sequence[Trace]) -> list[list[int]]:
        return sorted(np.concatenate([t.topk_expert_ids_TLK for t in some])[:100, 0].tolist())

    assert tokens(mixed.traces) == tokens(original.traces)
    first, mixed_first = (t.traces[0].topk_expert_ids_TLK[:, 0].tolist() for t in (original, mixed))
    assert mixed_first != first
    assert (sorted(mixed_first) == sorted(first)) is not across
