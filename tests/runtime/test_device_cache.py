"""The cache on the device decides what the simulator's cache decides, event by event."""

import pytest
import torch
from device_caches import BASE, SLOT_BYTES, F, make, same_state
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cache import ExpertCache
from runtime.device_cache import COUNTERS
from runtime.policies import POLICIES, make_policy
from tests.devices import KERNEL_DEVICE

NAMES = sorted(POLICIES)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_every_policy_leaves_the_same_books(name: str, kernels: bool, data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(4, 19))
    top_k = data.draw(st.integers(1, 4))
    slots = [data.draw(st.integers(1, num_experts)) for _ in range(2)]
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    policy = make_policy(name)
    device = make(policy, slots=slots, num_experts=num_experts, top_k=top_k, kernels=kernels)
    plain = ExpertCache(
        make_policy(name),
        num_layers=2,
        num_experts=num_experts,
        slots=torch.tensor(slots),
        device=KERNEL_DEVICE,
    )
    hits = misses = streamed = 0
    for _ in range(8):
        forecast_LE = torch.rand(2, num_experts, generator=generator).to(KERNEL_DEVICE)
        foresight = None if policy.foresight == "none" else forecast_LE
        device.advance(foresight)
        num_tokens = data.draw(st.integers(1, 4))
        for layer in range(2):
            scores = torch.rand(num_tokens, num_experts + 2, generator=generator)
            ids_TK = scores.topk(top_k).indices.to(KERNEL_DEVICE)  # ids of E and above are skipped
            needed_E = torch.zeros(num_experts, dtype=torch.bool, device=KERNEL_DEVICE)
            needed_E[ids_TK[ids_TK < num_experts]] = True
            before_E = plain.usage.resident_LE[layer].clone()
            step = plain.step(
                needed_E, layer=layer, forecast_LE=None if foresight is None else foresight[layer]
            )
            active = device.step(layer, ids_TK)
            hits += int(step.hit_LE.sum())
            misses += int((step.insert_LE | step.streamed_LE).sum())
            streamed += int(step.streamed_LE.sum())
            assert device.cache.slot_of_LE is not None
            assert plain.slot_of_LE is not None
            assert torch.equal(device.cache.slot_of_LE[layer], plain.slot_of_LE[layer])
            absent = (needed_E & ~before_E).nonzero().flatten().tolist()
            expected = absent + step.hit_LE.nonzero().flatten().tolist()
            assert active.expert_A[: int(active.num_1)].tolist() == expected
            for expert, address, present in zip(
                expected, active.slot_address_A.tolist(), active.present_A.tolist(), strict=False
            ):
                slot = int(plain.slot_of_LE[layer, expert])
                assert address == (0 if slot < 0 else BASE * (layer + 1) + slot * SLOT_BYTES)
                assert present == (F if before_E[expert] else 0)
        device.check_integrity()
    for field in ("last_use_LE", "inserted_LE", "use_count_LE", "visits_LE", "resident_LE"):
        assert torch.equal(getattr(device.cache.usage, field), getattr(plain.usage, field)), field
    for half_life, uses_LE in plain.usage.decayed_uses.items():
        torch.testing.assert_close(device.cache.usage.decayed_uses[half_life], uses_LE)
    counted = dict(zip(COUNTERS, device.counters_LX.sum(0).tolist(), strict=True))
    assert (counted["hits"], counted["misses"], counted["streamed"]) == (hits, misses, streamed)
    assert counted["accesses"] == hits + misses
    assert counted["missed_neurons"] == misses * F


@pytest.mark.parametrize("kernels", [True, False])
def test_what_lies_partly_in_a_slot_is_missed_in_part(kernels: bool) -> None:
    cache = make(make_policy("lru"), slots=[2], num_experts=4, top_k=1, kernels=kernels, held=128)
    cache.advance()
    cache.step(0, torch.tensor([[3]], device=KERNEL_DEVICE))
    cache.advance()
    active = cache.step(0, torch.tensor([[3]], device=KERNEL_DEVICE))
    assert active.present_A[0] == 128, "the slot holds the expert's top only"
    cache.present_LE[0, 3] = 64  # a prefetch that did not get further
    cache.advance()
    active = cache.step(0, torch.tensor([[3]], device=KERNEL_DEVICE))
    assert active.present_A[0] == 64
    assert cache.present_LE[0, 3] == 128, "the expert kernel brings the rest"
    counted = dict(zip(COUNTERS, cache.counters_LX[0].tolist(), strict=True))
    assert counted["missed_neurons"] == F + (F - 128) + (F - 64)
    assert counted["hits"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_what_other_experts_did(name: str) -> None:
    """What lets `advance` score all layers before their events."""
    policy = make_policy(name)
    cache = ExpertCache(policy, num_layers=1, num_experts=6, slots=6)
    for expert in (0, 1, 2, 1, 5):
        needed_E = torch.zeros(6, dtype=torch.bool)
        needed_E[expert] = True
        cache.step(needed_E, layer=0, forecast_LE=torch.rand(6))
    forecast_LE = torch.rand(1, 6)
    before_LE = policy.keep_scores(cache.usage, forecast_LE).expand(1, 6).clone()
    for field in ("last_use_LE", "inserted_LE", "use_count_LE", "visits_LE"):
        getattr(cache.usage, field)[0, 2] += 3
    for uses_LE in cache.usage.decayed_uses.values():
        uses_LE[0, 2] += 3
    after_LE = policy.keep_scores(cache.usage, forecast_LE).expand(1, 6)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(before_LE[:, others], after_LE[:, others])


@pytest.mark.parametrize("num_experts", [100, 150, 300])
def test_many_experts_are_compared_in_blocks_of_columns(num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    settings_of = {"slots": [40], "num_experts": num_experts, "top_k": 8}
    kernel = make(make_policy("forecast"), kernels=True, **settings_of)
    reference = make(make_policy("forecast"), kernels=False, **settings_of)
    for _ in range(6):
        # Ties, infinities and what is no number at all: the books must balance whatever comes.
        scores_E = torch.randint(-2, 3, (num_experts,), generator=generator).float()
        scores_E[::7], scores_E[1::11], scores_E[2::13] = -torch.inf, torch.inf, torch.nan
        ids_TK = torch.randint(num_experts, (4, 8), generator=generator).to(KERNEL_DEVICE)
        for cache in (kernel, reference):
            cache.advance(scores_E[None].to(KERNEL_DEVICE))
            cache.step(0, ids_TK)
            cache.check_integrity()
        same_state(kernel, reference)
    assert kernel.counters_LX[0, COUNTERS.index("evictions")] > 40


@pytest.mark.parametrize("name", NAMES)
def test_scores_lie_where_the_event_reads_them_wherever_forecasts_lie(name: str) -> None:
    cache = make(make_policy(name), slots=[3, 3], num_experts=6, top_k=2, kernels=False)
    elsewhere_LE = torch.rand(2, 6, device=KERNEL_DEVICE)
    for in_place in (False, True):
        forecast_LE = cache.keep_LE.copy_(elsewhere_LE) if in_place else elsewhere_LE
        cache.keep_LE.mul_(1 if in_place else torch.nan)
        cache.advance(forecast_LE)
        scores_LE = cache.policy.keep_scores(cache.cache.usage, elsewhere_LE).expand(2, 6)
        assert torch.equal(cache.keep_LE, scores_LE)
        forecast_E = cache.keep_LE[1].copy_(elsewhere_LE[0]) if in_place else elsewhere_LE[0]
        cache.rescore(1, forecast_E)
        scores_E = cache.policy.keep_scores(cache.cache.layer_usage(1), elsewhere_LE[0])
        assert torch.equal(cache.keep_LE[1], scores_E.expand(6))
        assert torch.equal(cache.keep_LE[0], scores_LE[0])


def test_a_slot_holds_everything_or_a_multiple_of_64_neurons() -> None:
    with pytest.raises(ValueError, match="slot_neurons=100"):
        make(make_policy("lru"), slots=[2], num_experts=4, top_k=1, kernels=False, held=100)


def test_a_reset_cache_is_empty_and_at_home() -> None:
    cache = make(make_policy("lfru"), slots=[2], num_experts=4, top_k=2, kernels=True)
    cache.advance()
    cache.step(0, torch.tensor([[0, 1]], device=KERNEL_DEVICE))
    cache.reset()
    cache.check_integrity()
    assert not cache.counters_LX.any()
    assert torch.equal(cache.address_LE, cache.home_address_LE)
