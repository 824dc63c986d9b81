"""Prefetches on the device decide as the simulator's do, and bring what the books say."""

import pytest
import torch
from device_caches import SLOT_BYTES, F, make, same_state
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cache import ExpertCache
from runtime.device_cache import COUNTERS, DeviceCache, SlotMemory
from runtime.device_prefetch import DevicePrefetch
from runtime.expert_layout import ExpertLayout
from runtime.kernels.copy import copy_records
from runtime.policies import POLICIES, make_policy
from tests.devices import KERNEL_DEVICE

BOTH = pytest.mark.parametrize("kernels", [True, False])


def layout(neurons: int = F) -> ExpertLayout:
    return ExpertLayout(
        hidden_size=8,
        expert_intermediate_size=neurons,
        dtype=torch.bfloat16,
        has_gate=True,
        has_bias=True,
        is_transposed=False,
        is_concatenated=True,
    )


NEURON_BYTES = 3 * 8 * 2
TAIL_BYTES = layout().record_bytes - F * NEURON_BYTES


def one_layer(*, slots: int, kernels: bool, num_experts: int = 8, held: int = F):
    cache = make(
        make_policy("lru"),
        slots=[slots],
        num_experts=num_experts,
        top_k=2,
        kernels=kernels,
        held=held,
        with_prefetch=True,
    )
    return cache, DevicePrefetch(cache, layout=layout(), max_fetches=4)


def mask(*experts: int, num_experts: int = 8) -> torch.Tensor:
    mask_E = torch.zeros(num_experts, dtype=torch.bool)
    mask_E[list(experts)] = True
    return mask_E.to(KERNEL_DEVICE)


def row(forecast: dict[int, float], num_experts: int = 8) -> torch.Tensor:
    values = [forecast.get(expert, 0.0) for expert in range(num_experts)]
    return torch.tensor(values, device=KERNEL_DEVICE)


def at_most(neurons: int) -> torch.Tensor:
    return torch.tensor([neurons], dtype=torch.int32, device=KERNEL_DEVICE)


def serve(cache: DeviceCache, *experts: int):
    cache.advance()
    return cache.step(0, torch.tensor([experts], device=KERNEL_DEVICE))


def fetched(prefetch: DevicePrefetch) -> list[tuple[int, int, int]]:
    """Source, target and bytes of the copies that there are."""
    rows = zip(*(tensor.tolist() for tensor in prefetch.copies(0)), strict=True)
    return [copy for copy in rows if copy[2]]


def counted(cache: DeviceCache) -> dict[str, int]:
    return dict(zip(COUNTERS, cache.counters_LX[0].tolist(), strict=True))


# Against the cache of the simulator, and against the reference


@BOTH
@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_whole_prefetches_leave_the_books_of_every_policy_as_expert_cache_does(
    name: str, kernels: bool, data: st.DataObject
) -> None:
    """Before a layer's event in a pass (a layer ahead) and after it (a token ahead)."""
    num_experts = data.draw(st.integers(4, 19))
    slots = [data.draw(st.integers(1, num_experts)) for _ in range(2)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    policy = make_policy(name)
    device = make(
        policy, slots=slots, num_experts=num_experts, top_k=2, kernels=kernels, with_prefetch=True
    )
    most = data.draw(st.integers(1, num_experts))
    prefetch = DevicePrefetch(device, layout=layout(), max_fetches=most)
    plain = ExpertCache(
        make_policy(name),
        num_layers=2,
        num_experts=num_experts,
        slots=torch.tensor(slots),
        with_prefetch=True,
        device=KERNEL_DEVICE,
    )
    came = wasted = 0

    def fetch(layer: int) -> None:
        nonlocal came, wasted
        # Few values, so that they tie; signed zeros among them.
        forecast_E = torch.randint(-2, 3, (num_experts,), generator=generator) * -0.5
        asked = {"margin": data.draw(st.sampled_from([0.0, 0.5, 0.7]))}
        if data.draw(st.booleans()):
            asked["protected"] = device.needed_LE[layer]
        if data.draw(st.booleans()):
            asked["victims_by"] = device.keep_LE[layer].clone()
        want_E = torch.rand(num_experts, generator=generator) < 0.6
        forecast_E, want_E = forecast_E.to(KERNEL_DEVICE), want_E.to(KERNEL_DEVICE)
        step = plain.prefetch(
            want_E,
            forecast_E,
            layer=layer,
            margin=asked["margin"],
            max_fetches=most,
            victims_by_LE=asked.get("victims_by"),
            protected_LE=asked.get("protected"),
        )
        copies = prefetch.fetch(
            layer,
            want_E,
            forecast_E,
            margin=asked["margin"],
            victims_by_E=asked.get("victims_by"),
            protected_E=asked.get("protected"),
        )
        came += int(step.num_inserts_L1)
        wasted += int(step.wasted_LE.sum())
        whole = layout().record_bytes
        assert copies.num_bytes_N.tolist() == [whole] * (n := int(step.num_inserts_L1)) + [0] * (
            most - n
        )
        into = plain.slot_of_LE[layer][step.insert_LE].tolist()
        targets = {device.memory[layer].base_address + slot * SLOT_BYTES for slot in into}
        assert set(copies.target_address_N[:n].tolist()) == targets

    for _ in range(5):
        forecast_LE = torch.rand(2, num_experts, generator=generator).to(KERNEL_DEVICE)
        foresight = None if policy.foresight == "none" else forecast_LE
        device.advance(foresight)
        for layer in range(2):
            if data.draw(st.booleans()):
                fetch(layer)
            ids_TK = torch.rand(1, num_experts, generator=generator).topk(2).indices
            needed_E = torch.zeros(num_experts, dtype=torch.bool)
            needed_E[ids_TK.flatten()] = True
            step = plain.step(
                needed_E.to(KERNEL_DEVICE),
                layer=layer,
                forecast_LE=None if foresight is None else foresight[layer],
            )
            wasted += int(step.wasted_LE.sum())
            device.step(layer, ids_TK.to(KERNEL_DEVICE))
            if data.draw(st.booleans()):
                fetch(layer)
        assert torch.equal(device.cache.slot_of_LE, plain.slot_of_LE)
        assert torch.equal(device.cache.prefetched_LE, plain.prefetched_LE)
        device.check_integrity()
    for field in ("last_use_LE", "inserted_LE", "use_count_LE", "visits_LE", "resident_LE"):
        assert torch.equal(getattr(device.cache.usage, field), getattr(plain.usage, field)), field
    totals = dict(zip(COUNTERS, device.counters_LX.sum(0).tolist(), strict=True))
    assert (totals["prefetched"], totals["wasted"]) == (came, wasted)
    assert (totals["prefetched_neurons"], totals["wasted_neurons"]) == (came * F, wasted * F)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_under_an_allowance_the_kernel_equals_the_reference(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(4, 40))
    held = data.draw(st.sampled_from([64, 128, F]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = {
        "slots": [data.draw(st.integers(1, num_experts))],
        "num_experts": num_experts,
        "top_k": 2,
        "held": held,
        "with_prefetch": True,
    }
    most = data.draw(st.integers(1, num_experts))
    caches = [make(make_policy("lfru"), kernels=kernels, **shape) for kernels in (True, False)]
    prefetches = [DevicePrefetch(cache, layout=layout(), max_fetches=most) for cache in caches]
    for _ in range(8):
        ids_TK = torch.rand(2, num_experts, generator=generator).topk(2).indices
        forecast_E = torch.randint(-1, 5, (num_experts,), generator=generator) / 4
        want_E = torch.rand(num_experts, generator=generator) < 0.7
        asked = {
            "margin": data.draw(st.sampled_from([0.0, 0.3])),
        }
        by_score = data.draw(st.booleans())
        allowance, left_1 = data.draw(st.integers(0, 3 * F)), at_most(-1)
        protects, serves = data.draw(st.booleans()), data.draw(st.booleans())
        for cache, prefetch in zip(caches, prefetches, strict=True):
            protected_E = cache.needed_LE[0] if protects else None
            before_E, evicted = cache.present_LE[0].clone(), cache.counters_LX[0, 4].clone()
            prefetch.fetch(
                0,
                want_E.to(KERNEL_DEVICE),
                forecast_E.to(KERNEL_DEVICE),
                protected_E=protected_E,
                victims_by_E=cache.keep_LE[0] if by_score else None,
                allowance_1=at_most(allowance),
                left_1=left_1,
                **asked,
            )
            grown_E = (cache.present_LE[0] - before_E).clamp(min=0)
            assert int(grown_E.sum()) == allowance - int(left_1)
            assert int(left_1) >= 0
            came_E = (before_E == 0) & cache.cache.usage.resident_LE[0]
            assert (grown_E[came_E] > 0).all(), "came for nothing"
            assert int(cache.counters_LX[0, 4] - evicted) <= int(came_E.sum())
            cache.check_integrity()
            if serves:
                cache.advance()
                cache.step(0, ids_TK.to(KERNEL_DEVICE))
        same_state(*caches)
        mine, theirs = (prefetch.copies(0) for prefetch in prefetches)
        assert torch.equal(mine.num_bytes_N, theirs.num_bytes_N)
        for mine_N, theirs_N in zip(mine[:2], theirs[:2], strict=True):
            assert torch.equal(mine_N[mine.num_bytes_N > 0], theirs_N[mine.num_bytes_N > 0])


# What one prefetch does


@BOTH
def test_an_allowance_brings_a_prefix_and_the_next_prefetch_continues_it(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=4, kernels=kernels)
    forecast_E = row({5: 0.9, 3: 0.4})
    prefetch.fetch(0, mask(3, 5), forecast_E, allowance_1=at_most(F + 100))
    home = cache.home_address_LE[0].tolist()
    base = cache.memory[0].base_address
    # Slots go by ascending id, copies by forecast; the 36 neurons beyond a chunk stay unused.
    assert fetched(prefetch) == [
        (home[5], base + SLOT_BYTES, layout().record_bytes),
        (home[3], base, 64 * NEURON_BYTES),
    ]
    assert cache.present_LE[0].tolist() == [0, 0, 0, 64, 0, F, 0, 0]
    prefetch.fetch(0, mask(3, 5), forecast_E, allowance_1=at_most(64))
    assert fetched(prefetch) == [
        (home[3] + 64 * NEURON_BYTES, base + 64 * NEURON_BYTES, 64 * NEURON_BYTES)
    ]
    prefetch.fetch(0, mask(3, 5), forecast_E)
    start = 128 * NEURON_BYTES
    assert fetched(prefetch) == [(home[3] + start, base + start, 64 * NEURON_BYTES + TAIL_BYTES)]
    prefetch.fetch(0, mask(3, 5), forecast_E)
    assert fetched(prefetch) == []
    assert counted(cache)["prefetched"] == 2
    assert counted(cache)["prefetched_neurons"] == 2 * F
    cache.check_integrity()


@BOTH
def test_the_event_misses_only_what_the_prefetch_did_not_bring(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=4, kernels=kernels)
    cache.advance()
    prefetch.fetch(0, mask(3), row({3: 0.5}), allowance_1=at_most(128))
    active = cache.step(0, torch.tensor([[3, 6]], device=KERNEL_DEVICE))
    assert active.expert_A[:2].tolist() == [6, 3]
    assert active.present_A[:2].tolist() == [0, 128]
    assert counted(cache)["missed_neurons"] == F + (F - 128)
    assert cache.present_LE[0].tolist() == [0, 0, 0, F, 0, 0, F, 0]


@BOTH
def test_what_goes_unused_is_wasted_as_far_as_it_had_come(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=2, kernels=kernels)
    prefetch.fetch(0, mask(3, 4), row({3: 0.5, 4: 0.4}), allowance_1=at_most(F + 64))
    serve(cache, 3)
    serve(cache, 0, 1)
    assert counted(cache)["wasted"] == 1
    assert counted(cache)["wasted_neurons"] == 64
    prefetch.fetch(0, mask(5), row({5: 0.5}), allowance_1=at_most(64))
    prefetch.fetch(0, mask(6), row({6: 0.9}))  # 1, 5 and their like are forecast at most 0
    prefetch.fetch(0, mask(7), row({7: 0.9, 6: 1.0}))
    assert counted(cache)["wasted_neurons"] == 64 + 64
    cache.check_integrity()


@BOTH
def test_nothing_goes_that_is_forecast_higher_or_protected(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=2, kernels=kernels)
    serve(cache, 0, 1)
    prefetch.fetch(0, mask(4, 5), row({0: 0.9, 1: 0.2, 4: 0.4, 5: 0.1}), margin=0.3)
    assert fetched(prefetch) == []
    prefetch.fetch(0, mask(4, 5), row({4: 0.4, 5: 0.3}), protected_E=cache.needed_LE[0])
    assert fetched(prefetch) == []
    prefetch.fetch(0, mask(4, 5), row({0: 0.9, 1: 0.2, 4: 0.4, 5: 0.1}), margin=0.1)
    assert cache.cache.usage.resident_LE[0].tolist() == mask(0, 4).tolist()


@BOTH
def test_victims_by_scores_are_the_lowest_that_no_newcomer_falls_short_of(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=3, kernels=kernels)
    serve(cache, 0, 1)
    serve(cache, 2)
    scores_E = row({0: -5.0, 1: -1.0, 2: 7.0})
    forecast_E = row({0: 0.5, 1: 0.3, 2: 0.0, 5: 0.9, 6: 0.45})
    prefetch.fetch(0, mask(5, 6), forecast_E, margin=0.1, victims_by_E=scores_E)
    # 0 beats 6: it stays, whatever its score, and so the next lowest scores go.
    assert cache.cache.usage.resident_LE[0].tolist() == mask(0, 5, 6).tolist()
    prefetch.fetch(0, mask(7), row({7: 0.9, 5: 0.85}), margin=0.1, victims_by_E=row({6: 1.0}))
    assert cache.cache.usage.resident_LE[0].tolist() == mask(5, 6, 7).tolist()
    assert counted(cache)["displaced"] == 3


@BOTH
def test_what_a_prefetch_displaced_is_regretted_until_the_prefetch_is_used(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=3, kernels=kernels)
    serve(cache, 0, 1)
    serve(cache, 2)
    prefetch.fetch(0, mask(5), row({5: 0.5}), allowance_1=at_most(64))  # in place of 0
    prefetch.fetch(0, mask(6), row({6: 0.4, 5: 0.5}), margin=0.0)  # in place of 1
    serve(cache, 0)  # in place of 2, which the policy lets go
    assert counted(cache)["regretted"] == 1
    serve(cache, 0)
    assert counted(cache)["regretted"] == 1, "once"
    serve(cache, 5)
    assert counted(cache)["used_neurons"] == 64
    serve(cache, 1)
    assert counted(cache)["regretted"] == 2, "6 is not used yet"
    prefetch.fetch(0, mask(3), row({3: 0.4}))
    serve(cache, 3, 6)
    serve(cache, 7)
    assert counted(cache)["regretted"] == 2, "everything has come true, or has gone"
    assert not cache.displaced_LE.any()


@BOTH
def test_an_expert_of_which_nothing_can_come_displaces_nothing(kernels: bool) -> None:
    cache, prefetch = one_layer(slots=2, kernels=kernels)
    serve(cache, 0, 1)
    prefetch.fetch(0, mask(4, 5), row({4: 0.4, 5: 0.3}), allowance_1=at_most(63))
    assert fetched(prefetch) == []
    assert cache.cache.usage.resident_LE[0].tolist() == mask(0, 1).tolist()
    prefetch.fetch(0, mask(4, 5), row({4: 0.4, 5: 0.3, 1: 0.1}), allowance_1=at_most(F))
    assert cache.cache.usage.resident_LE[0].tolist() == mask(1, 4).tolist()


@BOTH
def test_what_has_come_half_way_may_go_again(kernels: bool) -> None:
    """It is wanted, and would be continued; but a better one takes its slot."""
    cache, prefetch = one_layer(slots=1, kernels=kernels)
    prefetch.fetch(0, mask(3), row({3: 0.2}), allowance_1=at_most(64))
    prefetch.fetch(0, mask(3, 6), row({3: 0.2, 6: 0.8}))
    assert cache.present_LE[0].tolist() == [0, 0, 0, 0, 0, 0, F, 0]
    assert [num_bytes for _, _, num_bytes in fetched(prefetch)] == [layout().record_bytes]
    assert counted(cache)["wasted_neurons"] == 64


# Bytes


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_slots_hold_byte_for_byte_what_the_books_call_present(data: st.DataObject) -> None:
    """Copies made as written down, in poisoned memory; 96 neurons are a chunk and a half."""
    neurons = data.draw(st.sampled_from([96, 128]))
    held = data.draw(st.sampled_from([64, neurons]))
    records, num_experts, slots = layout(neurons), 5, data.draw(st.integers(1, 5))
    prefix_bytes = held * NEURON_BYTES
    slot_bytes = records.record_bytes if held == neurons else prefix_bytes
    home_EB = torch.randint(0, 256, (num_experts, records.record_bytes), dtype=torch.uint8)
    home_EB = home_EB.to(KERNEL_DEVICE)
    slots_CB = torch.full((slots, slot_bytes), 255, dtype=torch.uint8, device=KERNEL_DEVICE)
    cache = DeviceCache(
        make_policy("lru"),
        num_experts=num_experts,
        top_k=1,
        num_neurons=neurons,
        memory=[
            SlotMemory(
                base_address=slots_CB.data_ptr(),
                slot_bytes=slot_bytes,
                num_slots=slots,
                slot_neurons=held,
            )
        ],
        home_address_LE=home_EB.data_ptr() + torch.arange(num_experts)[None] * records.record_bytes,
        max_tokens=1,
        device=KERNEL_DEVICE,
        with_prefetch=True,
    )
    prefetch = DevicePrefetch(cache, layout=records, max_fetches=3)
    for _ in range(6):
        forecasts = st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts)
        forecast_E = torch.tensor(data.draw(forecasts), dtype=torch.float32, device=KERNEL_DEVICE)
        copies = prefetch.fetch(
            0,
            forecast_E > 0,
            forecast_E,
            allowance_1=at_most(data.draw(st.integers(0, 2 * neurons))),
        )
        copy_records(*copies, programs_per_record=2)
        if data.draw(st.booleans()):
            cache.advance()
            expert = data.draw(st.integers(0, num_experts - 1))
            cache.step(0, torch.tensor([[expert]], device=KERNEL_DEVICE))
            slot = int(cache.cache.slot_of_LE[0, expert])  # what write-through does
            slots_CB[slot] = home_EB[expert, :slot_bytes]
        for expert, slot in enumerate(cache.cache.slot_of_LE[0].tolist()):
            present = int(cache.present_LE[0, expert])
            num_bytes = records.record_bytes if present == neurons else present * NEURON_BYTES
            assert slot >= 0 or not present
            assert torch.equal(slots_CB[slot, :num_bytes], home_EB[expert, :num_bytes])


# Wrong arguments


def test_wrong_arguments_are_named() -> None:
    cache, prefetch = one_layer(slots=2, kernels=False)
    with pytest.raises(ValueError, match=r"max_fetches=9: must be in 1\.\.8"):
        DevicePrefetch(cache, layout=layout(), max_fetches=9)
    with pytest.raises(ValueError, match="margin=-0.1: must not be negative"):
        prefetch.fetch(0, mask(1), row({}), margin=-0.1)
    untracked = make(make_policy("lru"), slots=[2], num_experts=4, top_k=1, kernels=False)
    with pytest.raises(ValueError, match="with_prefetch=True"):
        DevicePrefetch(untracked, layout=layout(), max_fetches=1)
