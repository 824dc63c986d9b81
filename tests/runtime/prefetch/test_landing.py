"""Prefetches that displace nothing: what lands, what comes true, and the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetch_bench import NEURONS, Scripted, experts, options, serve

from runtime.device_cache import CHUNK_NEURONS, COUNTERS
from runtime.expert_layout import ExpertLayout
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
                    assert torch.equal(fetching._division.slots_LCP[layer][slot].cpu(), record_P)
    with_it, without = counted(fetching), counted(plain)
    assert with_it["missed_neurons"] + with_it["used_neurons"] == without["missed_neurons"]
    assert with_it["used_neurons"] + with_it["wasted_neurons"] == with_it["prefetched_neurons"]
    assert with_it["used_neurons"] > 0 or neurons == 64
    for name in ("accesses", "hits", "misses", "streamed", "evictions"):
        assert with_it[name] == without[name]


class Pieces:
    """What `Landing` should decide, in plain words: pieces of (layer, expert), neurons landed."""

    def __init__(self, count: int, num_neurons: int) -> None:
        self.count, self.num_neurons = count, num_neurons
        self.landed: dict[tuple[int, int], int] = {}

    def fetch(
        self,
        likely: dict[tuple[int, int], float],
        *,
        first_layer: int,
        allowance: int,
        is_first: bool,
    ) -> tuple[dict[tuple[int, int], int], int]:
        """What comes of each, and what is left of the allowance."""
        kept = {} if is_first else {k: n for k, n in self.landed.items() if k[0] >= first_layer}
        self.landed, came, left = kept, {}, allowance
        for key in sorted(likely, key=lambda key: (-likely[key], key)):
            if key not in self.landed and len(self.landed) == self.count:
                continue
            missing = self.num_neurons - self.landed.get(key, 0)
            portion = missing if missing <= left else left // CHUNK_NEURONS * CHUNK_NEURONS
            if not portion:
                continue
            self.landed[key] = self.landed.get(key, 0) + portion
            came[key] = portion
            left -= portion
        return came, left


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_likeliest_absent_experts_of_all_layers_land_window_after_window(
    data: st.DataObject,
) -> None:
    num_experts, num_layers = data.draw(st.integers(3, 20)), 4
    pieces = data.draw(st.integers(1, 3))
    cache = make(
        make_policy("lru"), slots=[2] * num_layers, num_experts=num_experts, top_k=2, kernels=True
    )
    layout = layout_of(cache.num_neurons)
    buffer = Landing(cache, layout=layout, pieces=pieces, layers_ahead=2)
    plain = Pieces(pieces, cache.num_neurons)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    least_L = torch.tensor([0.0, 0.3, float("inf"), 0.3])
    left_1 = torch.zeros(1, dtype=torch.int32, device=KERNEL_DEVICE)
    for _ in range(2):
        cache.advance()
        for layer in range(-1, num_layers - 1):
            active = None
            if layer >= 0:
                ids_K = torch.randperm(num_experts, generator=generator)[:2]
                active = cache.step(layer, ids_K[None].to(KERNEL_DEVICE))
            misses = active is not None and bool(
                (active.present_A[: int(active.num_1)] < cache.num_neurons).any()
            )
            layers = range(layer + 1, min(layer + 3, num_layers))
            next_HE = torch.rand(len(layers), num_experts, generator=generator).round(decimals=1)
            shorter, longer = sorted(data.draw(st.integers(0, 500)) for _ in range(2))
            at_once, rest = buffer.fetch(
                layers,
                next_HE.to(KERNEL_DEVICE),
                active=active,
                least_L=least_L.to(KERNEL_DEVICE),
                allowance_2=torch.tensor(
                    [shorter, longer], dtype=torch.int32, device=KERNEL_DEVICE
                ),
                left_1=left_1,
                is_first=layer < 0,
            )
            resident_LE = cache.cache.usage.resident_LE.cpu()
            likely = {
                (row, expert): float(next_HE[row - layer - 1, expert])
                for row in layers
                for expert in range(num_experts)
                if not resident_LE[row, expert]
                and next_HE[row - layer - 1, expert] > 0
                and next_HE[row - layer - 1, expert] >= least_L[row]
            }
            came, left = plain.fetch(
                likely,
                first_layer=layer + 1,
                allowance=shorter if misses or active is None else longer,
                is_first=layer < 0,
            )
            assert int(left_1) == left
            keys = list(zip(buffer._layer_N.tolist(), buffer._expert_N.tolist(), strict=True))
            landed = zip(keys, buffer._neurons_N.tolist(), strict=True)
            assert {key: neurons for key, neurons in landed if neurons} == plain.landed
            busy, idle = (rest, at_once) if misses else (at_once, rest)
            assert not idle.num_bytes_N.any()
            assert int(buffer.waits_1) == misses
            for piece, key in enumerate(keys):
                num_bytes = came.get(key, 0) * buffer._neuron_bytes
                if num_bytes and plain.landed[key] == cache.num_neurons:
                    num_bytes = layout.record_bytes - (
                        (cache.num_neurons - came[key]) * buffer._neuron_bytes
                    )
                assert int(busy.num_bytes_N[piece]) == num_bytes
                if num_bytes:
                    start = (plain.landed[key] - came[key]) * buffer._neuron_bytes
                    home = int(cache.home_address_LE[key])
                    assert int(busy.source_address_N[piece]) == home + start
                    place = buffer._buffer_NP.data_ptr() + piece * layout.record_bytes
                    assert int(busy.target_address_N[piece]) == place + start


def layout_of(num_neurons: int) -> ExpertLayout:
    return ExpertLayout(
        hidden_size=8,
        expert_intermediate_size=num_neurons,
        dtype=torch.bfloat16,
        has_gate=True,
        has_bias=True,
        is_transposed=False,
        is_concatenated=True,
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
        Landing(cache, layout=experts(source=None)._store.layout, pieces=1, layers_ahead=1)


def test_where_experts_are_many_fewer_layers_are_looked_at() -> None:
    def layers_ahead(num_experts: int, asked: int) -> int:
        cache = make(
            make_policy("lru"), slots=[2] * 6, num_experts=num_experts, top_k=1, kernels=False
        )
        layout = layout_of(cache.num_neurons)
        return Landing(cache, layout=layout, pieces=1, layers_ahead=asked).layers_ahead

    assert [layers_ahead(8, 12), layers_ahead(8, 3), layers_ahead(200, 12)] == [6, 3, 2]
