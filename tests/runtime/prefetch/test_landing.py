"""Prefetches that displace nothing: what lands, what comes true, and the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetch_bench import NEURONS, Scripted, experts, options, serve

from runtime.device_cache import CHUNK_NEURONS, COUNTERS
from runtime.expert_layout import ExpertLayout
from runtime.kernels.landing import claim
from runtime.policies import make_policy
from runtime.prefetch.landing import Landing
from tests.devices import KERNEL_DEVICE
from tests.runtime.device_caches import make


def landing(**changed):
    return options(into="landing", **changed)


def counted(backend) -> dict[str, int]:
    totals = backend.cache.counters_LX.sum(0).tolist()
    return dict(zip(COUNTERS, totals, strict=True))


def routing(num_tokens: int) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num_tokens, 3, 8, generator=generator).topk(2).indices.tolist()


@pytest.mark.parametrize(("slots", "neurons"), [(3, 64), (4, 3 * NEURONS), (2, NEURONS + 64)])
def test_no_bit_and_no_resident_changes_and_what_came_true_is_not_missed(
    slots: int, neurons: int
) -> None:
    source = Scripted(3, 8)
    plain = experts(source=None, slots=slots)
    fetching = experts(
        source=source, slots=slots, prefetch=landing(neurons=neurons, landing_records=2)
    )
    for ids_LK in routing(4):
        for layer, ids_K in enumerate(ids_LK):
            source.say(layer, ids_K, 0.9)
            source.next_LE[layer, ids_K[0] ^ 1] = 0.95  # the likeliest is wrong, mostly
        assert torch.equal(serve(fetching, ids_LK), serve(plain, ids_LK))
        fetching.cache.check_integrity()
        assert torch.equal(fetching.cache.cache.slot_of_LE, plain.cache.cache.slot_of_LE)
        for layer in range(3):
            for expert, slot in enumerate(fetching.cache.cache.slot_of_LE[layer].tolist()):
                if slot >= 0:
                    record_P = fetching._store.record_P(layer, expert)
                    assert torch.equal(fetching._slots_LCP[layer][slot].cpu(), record_P)
    with_it, without = counted(fetching), counted(plain)
    assert with_it["missed_neurons"] + with_it["used_neurons"] == without["missed_neurons"]
    assert with_it["used_neurons"] + with_it["wasted_neurons"] == with_it["prefetched_neurons"]
    assert with_it["used_neurons"] > 0 or neurons == 64
    for name in ("accesses", "hits", "misses", "streamed", "evictions"):
        assert with_it[name] == without[name]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_likeliest_absent_experts_land_as_far_as_the_allowance_goes(
    data: st.DataObject,
) -> None:
    num_experts, num_neurons = data.draw(st.integers(3, 40)), 192
    pieces = data.draw(st.integers(1, 3))
    allowance = data.draw(st.integers(0, pieces * num_neurons))
    least = data.draw(st.sampled_from([0.0, 0.3, float("inf")]))
    layout = ExpertLayout(
        hidden_size=8,
        expert_intermediate_size=num_neurons,
        dtype=torch.bfloat16,
        has_gate=True,
        has_bias=True,
        is_transposed=False,
        is_concatenated=True,
    )
    cache = make(make_policy("lru"), slots=[2], num_experts=num_experts, top_k=2, kernels=True)
    buffer = Landing(cache, layout=layout, pieces=pieces)
    values = st.lists(st.sampled_from([0.0, 0.2, 0.3, 0.9]), min_size=num_experts)
    next_E = torch.tensor(data.draw(values)[:num_experts], device=KERNEL_DEVICE)
    needed_K = data.draw(
        st.lists(st.integers(0, num_experts - 1), min_size=2, max_size=2, unique=True)
    )

    def serve_event(*ids: int):
        cache.advance()
        return cache.step(0, torch.tensor([ids], device=KERNEL_DEVICE))

    serve_event(0, 1)
    left_1 = torch.zeros(1, dtype=torch.int32, device=KERNEL_DEVICE)
    buffer.fetch(
        0,
        next_E,
        least_1=torch.tensor([least], device=KERNEL_DEVICE),
        allowance_1=torch.tensor([allowance], dtype=torch.int32, device=KERNEL_DEVICE),
        left_1=left_1,
    )
    # In plain words.
    likely = sorted(
        (e for e in range(2, num_experts) if next_E[e] >= least and next_E[e] > 0),
        key=lambda e: (-float(next_E[e]), e),
    )
    expected, left = {}, allowance
    for expert in likely[:pieces]:
        portion = num_neurons if left >= num_neurons else left // CHUNK_NEURONS * CHUNK_NEURONS
        if portion:
            expected[expert] = portion
        left -= portion
    landed = zip(buffer._expert_N.tolist(), buffer._neurons_N.tolist(), strict=True)
    assert {expert: neurons for expert, neurons in landed if neurons} == expected
    assert int(left_1) == allowance - sum(expected.values())
    cache.counters_LX.zero_()
    active = serve_event(*needed_K)
    missed = int(cache.counters_LX[0, COUNTERS.index("missed_neurons")])
    before = active.present_A.clone()
    buffer_copies = buffer._landing.num_bytes_N.tolist()
    claim_only(buffer, active)
    given_to = {}
    for entry in range(int(active.num_1)):
        if int(active.present_A[entry]) != int(before[entry]):
            given_to[int(active.expert_A[entry])] = int(active.present_A[entry])
    assert given_to == {e: n for e, n in expected.items() if e in needed_K}
    now = dict(zip(COUNTERS, cache.counters_LX[0].tolist(), strict=True))
    assert now["missed_neurons"] == missed - sum(given_to.values())
    assert now["used_neurons"] == sum(given_to.values())
    assert now["wasted_neurons"] == sum(expected.values()) - sum(given_to.values())
    claimed = buffer._claimed_bytes_N.tolist()
    for piece, expert in enumerate(expected):
        assert claimed[piece] == (buffer_copies[piece] if expert in needed_K else 0)


def claim_only(buffer: Landing, active) -> None:
    """`Landing.claim` without its copies: the slots of these caches are made up."""
    claim(
        expert_N=buffer._expert_N,
        neurons_N=buffer._neurons_N,
        landed_bytes_N=buffer._landing.num_bytes_N,
        active=active,
        target_N=buffer._slot_N,
        num_bytes_N=buffer._claimed_bytes_N,
        counters_X=buffer._cache.counters_LX[0],
    )


def test_what_never_comes_true_is_switched_off() -> None:
    source = Scripted(3, 8)
    backend = experts(source=source, prefetch=landing(review_tokens=2))
    for token in range(8):
        for layer in range(3):
            source.say(layer, [6, 7])
        serve(backend, [[token % 2, 2 + token % 2]] * 3)
    assert backend.prefetcher.review.layers_off == {0, 1, 2}
    assert backend.stats().prefetch_layers_off == 3
    assert backend.stats().wasted_bytes == backend.stats().prefetched_bytes > 0


def test_slots_of_tops_only_are_refused() -> None:
    cache = make(make_policy("lru"), slots=[2], num_experts=4, top_k=1, kernels=False, held=64)
    with pytest.raises(ValueError, match="landing needs slots that hold whole experts"):
        Landing(cache, layout=experts(source=None)._store.layout, pieces=1)
