"""What a replay counts as an event, the figures that follow, and what it refuses."""

import random
from dataclasses import replace

import pytest
import torch

from runtime.cache import Event
from runtime.metrics import Clock
from runtime.replay import EventList
from runtime.simulate import replay_log, simulate
from tests.runtime.replay_fakes import golden_traces, random_request, run, trace_list

# What an event is


def test_a_prompt_is_one_event_with_its_distinct_experts() -> None:
    request = [[[0, 1]], [[1, 2]], [[1, 3]]]
    union = run(trace_list(request, prompts=[2]), "lru", slots=[4])["lru"]
    assert (union.prefill, union.hits, union.accesses) == ("union", 1, 3 + 2)
    assert (union.decode_hits, union.decode_accesses) == (1, 2)
    rows = run(trace_list(request, prompts=[2]), "lru", slots=[4], prefill="per_token")["lru"]
    assert (rows.prefill, rows.hits, rows.accesses) == ("per_token", 2, 6)


def test_traces_of_prompts_alone_are_replayed_token_by_token_unless_told_otherwise() -> None:
    traces = trace_list([[[0, 1]], [[1, 2]]], prompts=[2])
    assert run(traces, "lru", slots=[4])["lru"].accesses == 4
    assert run(traces, "lru", slots=[4], prefill="union")["lru"].accesses == 3


def test_a_prompt_that_needs_more_than_the_slots_streams_the_rest() -> None:
    traces = trace_list([[[0, 1]], [[2, 3]], [[0, 3]]], prompts=[2])
    result = run(traces, "lru", slots=[2])["lru"]
    assert (result.streamed, result.hits) == (2, 1)


def test_the_cache_persists_across_requests() -> None:
    result = run(trace_list([[[0, 1]]], [[[1, 0]]]), "lru", slots=[2])["lru"]
    assert (result.hits, result.accesses) == (2, 4)


def test_max_tokens_cuts_the_last_request() -> None:
    traces = trace_list([[[0, 1]]] * 5, [[[2, 3]]] * 5)
    assert run(traces, "lru", slots=[2], max_tokens=7)["lru"].accesses == 14
    events = EventList.of(traces, max_tokens=7)
    assert (events.num_tokens, events.trace_index.tolist()) == (7, [0] * 5 + [1] * 2)


def test_long_prompts_and_chunk_borders_lose_no_event() -> None:
    rnd = random.Random(5)
    requests = [random_request(rnd, n) for n in (700, 3, 255, 256, 257)]
    traces = trace_list(*requests, prompts=[600, 0, 100, 256, 1])
    seen = list(EventList.of(traces))
    assert sum(event.index_NLK.shape[0] for event in seen) == 700 + 3 + 255 + 256 + 257
    start = 0
    rows = [row for request in requests for row in request]
    for event in seen:
        tokens = rows[start : start + event.index_NLK.shape[0]]
        for layer in range(2):
            needed = {expert for row in tokens for expert in row[layer]}
            assert set(event.needed_LE[layer].nonzero().flatten().tolist()) == needed
        start += len(tokens)


# Derived figures


def test_gap_closed_runs_from_lfru_to_belady() -> None:
    results = run(golden_traces(), slots=[4])
    lfru, lru, belady = (results[name].hits for name in ("lfru", "lru", "belady"))
    assert results["lru"].gap_closed == (lru - lfru) / (belady - lfru)
    assert (results["lfru"].gap_closed, results["belady"].gap_closed) == (0.0, 1.0)
    assert results["lru"].belady_misses == results["belady"].accesses - belady
    assert run(trace_list([[[0, 1]]]), "lru", slots=[2])["lru"].gap_closed is None


def test_bytes_ratios_and_times_follow_from_the_counts() -> None:
    traces = trace_list([[[0, 1], [0, 1]], [[0, 2], [2, 3]]], expert_bytes=[10, 1000])
    clock = Clock(link_bytes_per_s=1e3, compute_s_per_layer=2.0, link_latency_s=0.5)
    result = run(traces, "lru", slots=[4], clock=clock)["lru"]
    assert result.hit_ratio_per_layer == [0.25, 0.0]
    assert result.miss_bytes == 3 * 10 + 4 * 1000
    assert (result.budget_bytes, result.lru_floor_bytes) == (4 * 1010, 2 * 1010)
    link_s, compute_s = (7 * 0.5 + 4.03) / 2, 2 * 2.0
    assert result.serial_s == pytest.approx(link_s + compute_s)
    assert result.bound_s == pytest.approx(max(link_s, compute_s))


def test_a_global_lru_below_one_tokens_working_set_hits_next_to_nothing(caplog) -> None:
    """Every token uses the same experts, and yet: each is evicted before its layer comes again."""
    traces = trace_list([[[0, 1], [0, 1], [0, 1]]] * 5, expert_bytes=[1, 1, 1])

    def hits(budget_bytes: int) -> int:
        return run(traces, "lru", budget_bytes=[budget_bytes], scope="global")["lru"].hits

    assert hits(6) == 4 * 6
    assert not caplog.records
    assert hits(4) == 0
    assert "below one token's working set of 6 bytes" in caplog.text


def test_a_byte_budget_per_layer_is_cut_into_equal_slots() -> None:
    traces = trace_list([[[0, 1], [0, 1]]], expert_bytes=[10, 30])
    result = run(traces, "lru", budget_bytes=[139])["lru"]
    assert (result.slots, result.budget_bytes) == (3, 139)


def test_the_log_of_a_replay_names_every_change() -> None:
    traces = trace_list([[[0, 1], [2, 3]], [[0, 2], [2, 3]]])
    log = replay_log(traces, policy="lru", slots=torch.tensor([2, 3]))
    assert [event for event in log if event.step == 2] == [
        Event(2, 0, "hit", 0),
        Event(2, 0, "miss", 2),
        Event(2, 0, "evict", 1),
        Event(2, 1, "hit", 2),
        Event(2, 1, "hit", 3),
    ]


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": [1]}, r"slots=1: must be at least top-k=2"),
        ({"slots": [7]}, r"at most the 6 experts"),
        ({"slots": [3], "budget_bytes": [9]}, "either slots or budget_bytes; both were given"),
        ({}, "either slots or budget_bytes; neither was given"),
        ({"slots": [3], "scope": "world"}, "scope='world': must be one of layer, global"),
        ({"slots": [3], "prefill": "no"}, "prefill='no': must be one of auto, union, per_token"),
        ({"slots": [3], "max_tokens": 0}, "max_tokens=0: must be at least 1"),
        ({"slots": [3], "policies": ["best"]}, "'best' does not exist; there are fifo, lru"),
        ({"slots": [3], "policies": []}, "give at least one"),
        ({"slots": [3], "policies": ["forecast"]}, "'forecast' spends a forecast"),
        ({"budget_bytes": [19]}, "19: that is 0 slots a layer; top-2 routing needs 2"),
        ({"budget_bytes": [19], "scope": "global"}, "needs top-2 experts of a layer at once, 20"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    traces = trace_list([[[0, 1], [0, 1]]], expert_bytes=[10, 10])
    with pytest.raises(ValueError, match=message):
        simulate(traces, **{"policies": ["lru"], **arguments})


def test_bytes_need_sizes() -> None:
    traces = trace_list([[[0, 1]]])
    with pytest.raises(ValueError, match="sizes of the experts of test .* are not known"):
        simulate(traces, policies=["lru"], budget_bytes=[100])
    with pytest.raises(ValueError, match="a clock needs the experts' sizes"):
        simulate(traces, policies=["lru"], slots=[2], clock=Clock(link_bytes_per_s=1.0))


def test_an_empty_trace_set_is_refused() -> None:
    empty = replace(trace_list([[[0, 1]]]), traces=[])
    with pytest.raises(ValueError, match="no routed token"):
        simulate(empty, policies=["lru"], slots=[2])
