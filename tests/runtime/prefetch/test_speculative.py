"""MoEpic's prefetcher: bottoms of tops and whole experts land, in order, and no bit changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetch_bench import NEURONS, Scripted, experts, options, serve

from runtime.device_cache import CHUNK_NEURONS, COUNTERS, Landed
from runtime.kernels.speculate import choose, settle
from runtime.slot_split import SlotSplit
from tests.devices import KERNEL_DEVICE

TOPS = SlotSplit(slots=(4, 3, 8), neurons=(64, NEURONS, 64))


def beside(*, neurons: int, records: int = 2):
    return options(into="beside", neurons=neurons, landing_records=records)


def counted(backend) -> dict[str, int]:
    totals = backend.cache.counters_LX.sum(0).tolist()
    return dict(zip(COUNTERS, totals, strict=True))


@pytest.mark.parametrize("neurons", [64, 3 * NEURONS])
def test_what_came_true_is_not_missed_and_nothing_else_changes(neurons: int) -> None:
    source = Scripted(3, 8)
    plain = experts(source=None, slots=TOPS)
    fetching = experts(source=source, slots=TOPS, prefetch=beside(neurons=neurons))
    ids_TLK = torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(0)).topk(2).indices
    for ids_LK in ids_TLK.tolist():
        for layer, ids_K in enumerate(ids_LK):
            source.say(layer, ids_K, 0.9)
            source.next_LE[layer, ids_K[0] ^ 1] = 0.95  # the likeliest is wrong, mostly
        assert torch.equal(serve(fetching, ids_LK), serve(plain, ids_LK))
        fetching.cache.check_integrity()
        held_LE = fetching.cache.cache.slot_of_LE
        assert torch.equal(held_LE, plain.cache.cache.slot_of_LE)
        for layer in range(3):
            taken = held_LE[layer][held_LE[layer] >= 0]
            ours, theirs = (b._division.slots_LCP[layer][taken] for b in (fetching, plain))
            assert torch.equal(ours, theirs)
    with_it, without = counted(fetching), counted(plain)
    assert with_it["missed_neurons"] + with_it["used_neurons"] == without["missed_neurons"]
    assert with_it["used_neurons"] + with_it["wasted_neurons"] == with_it["prefetched_neurons"]
    assert with_it["used_neurons"] > 0 or neurons == 64
    for name in ("accesses", "hits", "misses", "streamed", "evictions"):
        assert with_it[name] == without[name]
    assert fetching.stats().prefetched_bytes > 0


def test_what_is_read_beside_the_slots_is_what_landed_there() -> None:
    """Poison the buffer instead of copying: what came true must then show it."""
    source = Scripted(3, 8)
    fetching = experts(source=source, slots=TOPS, prefetch=beside(neurons=3 * NEURONS))
    for layer in range(3):
        source.say(layer, [1])
    serve(fetching, [[1, 2]] * 3)
    speculative = fetching.speculative
    assert speculative is not None

    def poison(layer: int) -> None:
        speculative._buffer_NP.fill_(torch.nan)

    outputs_LD = serve(fetching, [[1, 2]] * 3, before=poison)
    # Layer 1 has room for whole experts: there nothing was left to land.
    assert outputs_LD.isnan().any(-1).tolist() == [True, False, True]
    assert serve(fetching, [[1, 2]] * 3).isfinite().all(), "bottoms are not kept"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_are_what_is_missing_of_the_likeliest_as_far_as_it_goes(data: st.DataObject) -> None:
    num_experts, num_neurons = data.draw(st.integers(3, 40)), 192
    pieces = data.draw(st.integers(1, 4))
    allowance = data.draw(st.integers(0, 4 * num_neurons))

    def table(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=KERNEL_DEVICE)

    def drawn(values: list[float]) -> list[float]:
        strategy = st.lists(st.sampled_from(values), min_size=num_experts, max_size=num_experts)
        return data.draw(strategy)

    present, scores = drawn([0, 64, 128, 192]), drawn([0.0, 0.2, 0.3, 0.9])
    needed = drawn([False, True])
    homes = [1_000_000 * (e + 1) for e in range(num_experts)]
    landed = Landed(*(table([7] * num_experts, dtype) for dtype in (torch.int64, torch.int32)))
    portion_E = table([7] * num_experts, torch.int32)
    source_N, target_N, num_bytes_N = (table([7] * pieces, torch.int64) for _ in range(3))
    counters_X = table([0] * len(COUNTERS), torch.int64)
    choose(
        next_E=table(scores, torch.float32),
        present_E=table(present, torch.int32),
        home_E=table(homes, torch.int64),
        num_neurons=num_neurons,
        neuron_bytes=10,
        record_bytes=2000,
        chunk_neurons=CHUNK_NEURONS,
        allowance=allowance,
        buffer_address=64,
        landed=landed,
        portion_E=portion_E,
        source_N=source_N,
        target_N=target_N,
        num_bytes_N=num_bytes_N,
        counters_X=counters_X,
    )
    # In plain words.
    likely = sorted(
        (e for e in range(num_experts) if scores[e] > 0 and present[e] < num_neurons),
        key=lambda e: (-scores[e], e),
    )
    left, expected = allowance, {}
    for place, expert in enumerate(likely):
        missing = num_neurons - present[expert]
        comes = missing if missing <= left else left // CHUNK_NEURONS * CHUNK_NEURONS
        left = max(0, left - missing)
        if comes and place < pieces:
            expected[expert] = comes
    assert {e: n for e, n in enumerate(portion_E.tolist()) if n} == expected
    until = [present[e] + expected[e] if e in expected else 0 for e in range(num_experts)]
    assert landed.until_E.tolist() == until
    copies = list(zip(source_N.tolist(), target_N.tolist(), num_bytes_N.tolist(), strict=True))
    for place, (expert, comes) in enumerate(expected.items()):
        start = 10 * present[expert]
        tail = 2000 - 10 * num_neurons if present[expert] + comes == num_neurons else 0
        at = 64 + 2000 * place
        assert int(landed.address_E[expert]) == at
        assert copies[place] == (homes[expert] + start, at + start, 10 * comes + tail)
    assert num_bytes_N.tolist()[len(expected) :] == [0] * (pieces - len(expected))
    settle(portion_E=portion_E, needed_E=table(needed, torch.bool), counters_X=counters_X)
    now = dict(zip(COUNTERS, counters_X.tolist(), strict=True))
    used = sum(n for e, n in expected.items() if needed[e])
    assert now["prefetched"] == len(expected)
    assert now["prefetched_neurons"] == sum(expected.values())
    assert (now["used_neurons"], now["missed_neurons"]) == (used, -used)
    assert now["wasted"] == sum(not needed[e] for e in expected)
    assert now["wasted_neurons"] == sum(expected.values()) - used


def test_without_a_window_nothing_comes_and_without_a_word_neither() -> None:
    source = Scripted(3, 8)
    nothing = experts(source=source, slots=TOPS, prefetch=beside(neurons=32))
    assert nothing.speculative is not None
    assert nothing.speculative.allowance == 0
    serve(nothing, [[1, 2]] * 3)
    assert source.asked == []

    class Silent(Scripted):
        def next_HE(self, layers, now):
            return None

    silent = experts(source=Silent(3, 8), slots=TOPS, prefetch=beside(neurons=NEURONS))
    serve(silent, [[1, 2]] * 3)
    assert counted(silent)["prefetched"] == 0


def test_the_link_is_measured_where_its_rate_is_not_given() -> None:
    given = beside(neurons=NEURONS)
    fetching = experts(
        source=Scripted(3, 8),
        slots=TOPS,
        prefetch=type(given)(into="beside", window_s=1e-3, landing_records=2),
    )
    assert fetching.speculative is not None
    assert fetching.speculative.allowance > 0
