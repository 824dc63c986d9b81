"""The ablation's arithmetic, on traces whose routing is known."""

import numpy as np
import pytest
import torch

from benchmarks.finemoe_ablation import Tally, ablate, at_size, by_counts, judged_tokens
from predictors.routing import expert_use_TLE
from tests.predictors.maps import SPEC, make_trace, make_traces, random_kinds


def test_maps_find_what_counts_and_popularity_cannot() -> None:
    """Every token's kind is drawn anew, so that neither the request nor the mean tells it."""
    traces = make_traces({"fit": [make_trace(f"r{n}", random_kinds(n)) for n in range(12)]})
    outcome = ablate("fake", traces, None, 50)
    of_store = outcome["stores"]["paper: 1000 records, top-1"]
    rows = {row["variant"]: row for row in of_store["results"] if row["distance"] == 3}
    assert max(rows[name]["found"]["mean"] for name in ("popularity", "hit count")) < 0.6
    assert rows["Map(T)"]["found_from_layer_d"]["mean"] > 0.75
    assert rows["Map(T)"]["found_by_layer"][:3] == [0.0, 0.0, 0.0]
    assert rows["Map(T+S)"]["found"]["mean"] > 0.75
    assert rows["Map(T)"]["set_size"]["mean"] == SPEC.top_k / 2
    assert rows["Map(T+S)"]["set_size"]["mean"] == SPEC.top_k
    assert rows["Map(T+S+delta)"]["set_size"]["mean"] >= SPEC.top_k
    assert of_store["papers_order"]["hit count < Map(T)"] == [
        rows["hit count"]["found"]["each"][n] < rows["Map(T)"]["found"]["each"][n] for n in range(3)
    ]
    assert all(of_store["papers_order"]["Map(T) < Map(T+S)"])
    assert all(row["distance"] < SPEC.num_layers for row in of_store["results"])


def test_requests_are_matched_by_the_cosine_of_their_counts_so_far() -> None:
    stored = [make_trace(f"s{n}", [n] * 5) for n in range(3)]
    counts_RLE = torch.stack(
        [
            torch.from_numpy(expert_use_TLE(trace, SPEC.num_experts)).sum(0).float()
            for trace in stored
        ]
    )
    trace = make_trace("t", [1, 1, 2, 1], noise=0.0)
    judged = judged_tokens(make_traces({"test": [trace]}), 99)
    use_TLE = expert_use_TLE(trace, SPEC.num_experts).astype(float)
    found_L = np.zeros(SPEC.num_layers)
    for t in range(4):
        for layer in range(SPEC.num_layers):
            query_LE = use_TLE[:t].sum(axis=0)
            query_LE[: max(0, layer - 2 + 1)] += use_TLE[t, : max(0, layer - 2 + 1)]
            cosine_R = [
                float((query_LE * counts_LE.numpy()).sum() / counts_LE.norm())
                for counts_LE in counts_RLE
            ]
            counts_E = counts_RLE[int(np.argmax(cosine_R)), layer].numpy()
            chosen = np.argsort(-counts_E, kind="stable")[: SPEC.top_k]
            found_L[layer] += use_TLE[t, layer, chosen].sum() / (4 * SPEC.top_k)
    assert by_counts(counts_RLE, judged, SPEC.top_k)[2].found_L == pytest.approx(found_L)


def test_sets_of_equal_size_are_read_between_two_sizes() -> None:
    by_size = {2: Tally([0.2, 0.4], [2.0, 2.0]), 3: Tally([0.6, 0.8], [3.0, 3.0])}
    assert at_size(by_size, 2.0) == pytest.approx(0.3)
    assert at_size(by_size, 2.5) == pytest.approx(0.5)
