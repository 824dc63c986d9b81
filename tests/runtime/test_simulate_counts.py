"""Counts of every policy: golden ones, and those of a cache written in plain Python."""

import math
import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cache import KEEP, ReferenceCache

from runtime.simulate import simulate
from tests.runtime.replay_fakes import (
    ALL_HEURISTICS,
    Seer,
    golden_traces,
    random_request,
    run,
    trace_list,
)

GOLDEN = {  # (policy, slots): (hits, misses, evictions)
    ("fifo", 3): (2325, 1275, 1266),
    ("fifo", 4): (2517, 1083, 1071),
    ("fifo", 8): (3139, 461, 437),
    ("fifo", 12): (3437, 163, 127),
    ("lru", 3): (2318, 1282, 1273),
    ("lru", 4): (2572, 1028, 1016),
    ("lru", 8): (3248, 352, 328),
    ("lru", 12): (3475, 125, 89),
    ("lfu", 3): (2187, 1413, 1404),
    ("lfu", 4): (2313, 1287, 1275),
    ("lfu", 8): (2746, 854, 830),
    ("lfu", 12): (3115, 485, 449),
    ("lfru", 3): (2372, 1228, 1219),
    ("lfru", 4): (2613, 987, 975),
    ("lfru", 8): (3206, 394, 370),
    ("lfru", 12): (3429, 171, 135),
    ("lcp", 3): (2274, 1326, 1317),
    ("lcp", 4): (2454, 1146, 1134),
    ("lcp", 8): (2993, 607, 583),
    ("lcp", 12): (3361, 239, 203),
    ("least_stale", 3): (2318, 1282, 1273),
    ("least_stale", 4): (2572, 1028, 1016),
    ("least_stale", 8): (3248, 352, 328),
    ("least_stale", 12): (3475, 125, 89),
    ("random", 3): (2327, 1273, 1264),
    ("random", 4): (2514, 1086, 1074),
    ("random", 8): (3115, 485, 461),
    ("random", 12): (3412, 188, 152),
    ("belady", 3): (2609, 991, 982),
    ("belady", 4): (2902, 698, 686),
    ("belady", 8): (3396, 204, 180),
    ("belady", 12): (3520, 80, 44),
    ("finemoe", 3): (2489, 1111, 1102),
    ("finemoe", 4): (2789, 811, 799),
    ("finemoe", 8): (3381, 219, 195),
    ("finemoe", 12): (3514, 86, 50),
}


def test_golden_counts_of_every_policy_and_size() -> None:
    traces, seer = golden_traces(), Seer(gamma=0.9)
    seer.fit(traces)
    results = simulate(
        traces,
        policies=[*ALL_HEURISTICS, "finemoe"],
        slots=[3, 4, 8, 12],
        predictor=seer,
        with_truth=True,
    )
    counts = {(r.policy, r.slots): (r.hits, r.accesses - r.hits, r.evictions) for r in results}
    paste = "\n".join(f"    {key!r}: {value!r}," for key, value in counts.items())
    assert counts == GOLDEN, f"counts changed; if that is right, say why and paste:\n{paste}"
    # 3 requests x 200 tokens x 3 layers x top-2, and every miss ends resident or evicted.
    for (_, slots), (hits, misses, evictions) in counts.items():
        assert hits + misses == 3600
        assert misses - evictions == 3 * slots


# Against a cache written in plain Python


def reference_hits(
    events: list[list[set[int]]], name: str, *, slots: int | None = None, pool=None
) -> tuple[int, int]:
    """Hits and evictions of per-layer caches, or of one pool (bytes, sizes per layer)."""
    num_layers = len(events[0])
    if pool is None:
        caches = [ReferenceCache(KEEP[name], slots, [1] * 6) for _ in range(num_layers)]
    else:
        budget_bytes, sizes = pool
        caches = [ReferenceCache(KEEP[name], budget_bytes, [s for s in sizes for _ in range(6)])]
        caches *= num_layers
    calls = [(layer, needed) for event in events for layer, needed in enumerate(event)]
    hits = evictions = 0
    for i, (layer, needed) in enumerate(calls):
        offset = 0 if pool is None else 6 * layer
        cache = caches[layer]
        forecast = [-math.inf] * (6 if pool is None else 6 * num_layers)
        for j in reversed(range(i + 1, len(calls))):
            if pool is not None or calls[j][0] == layer:
                first = 0 if pool is None else 6 * calls[j][0]
                for expert in calls[j][1]:
                    forecast[first + expert] = -float(j)
        cache.forecast = forecast
        hit, _, evicted, _ = cache.serve({offset + expert for expert in needed})
        hits, evictions = hits + len(hit), evictions + len(evicted)
    return hits, evictions


def events_of(request: Sequence, prompt: int) -> list[list[set[int]]]:
    prefix = [[{e for row in request[:prompt] for e in row[la]} for la in range(2)]]
    return (prefix if prompt else []) + [[set(layer) for layer in row] for row in request[prompt:]]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(2, 6))
def test_per_layer_caches_equal_a_plain_cache(seed: int, prompt: int, slots: int) -> None:
    request = random_request(random.Random(seed), 12)
    traces = trace_list(request, prompts=[prompt])
    results = run(traces, slots=[slots])
    for name, result in results.items():
        expected = reference_hits(events_of(request, prompt), name, slots=slots)
        assert (result.hits, result.evictions) == expected, name


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.lists(st.integers(1, 5), min_size=2))
def test_one_pool_of_bytes_equals_a_plain_cache(seed: int, prompt: int, sizes: list[int]) -> None:
    rnd = random.Random(seed)
    request = random_request(rnd, 10)
    traces = trace_list(request, prompts=[prompt], expert_bytes=sizes[:2])
    budget = rnd.randint(2 * max(sizes[:2]), 6 * sum(sizes[:2]))
    results = run(traces, budget_bytes=[budget], scope="global")
    for name, result in results.items():
        expected = reference_hits(events_of(request, prompt), name, pool=(budget, sizes[:2]))
        assert (result.hits, result.evictions) == expected, name


def test_budgets_and_policies_together_equal_each_alone() -> None:
    traces = golden_traces()
    together = simulate(traces, policies=ALL_HEURISTICS, slots=[3, 7], max_tokens=150)
    for result in together:
        (alone,) = simulate(traces, policies=[result.policy], slots=[result.slots], max_tokens=150)
        assert alone == result


def test_a_pool_of_equal_sizes_does_not_depend_on_the_unit() -> None:
    """Known sizes go through the byte budget, unknown ones through slots."""
    request = random_request(random.Random(3), 40)
    unknown = run(trace_list(request), slots=[3], scope="global")
    known = run(trace_list(request, expert_bytes=[7, 7]), slots=[3], scope="global")
    for name, result in unknown.items():
        assert (result.hits, result.evictions) == (known[name].hits, known[name].evictions)
        assert (result.miss_bytes, known[name].miss_bytes) == (
            None,
            7 * (result.accesses - result.hits),
        )
