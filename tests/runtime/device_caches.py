"""Device caches of made-up memory, and how two of them are compared."""

import functools

import torch

from runtime.device_cache import DeviceCache, SlotMemory
from runtime.policies.base import Policy
from tests.devices import KERNEL_DEVICE

F, SLOT_BYTES, BASE = 192, 1 << 20, 1 << 40


def make(
    policy: Policy,
    *,
    slots: list[int],
    num_experts: int,
    top_k: int,
    kernels: bool,
    held: int = F,
    **kwargs,
) -> DeviceCache:
    home_LE = torch.arange(len(slots) * num_experts).view(len(slots), -1) * 7 + 1
    return DeviceCache(
        policy,
        num_experts=num_experts,
        top_k=top_k,
        num_neurons=F,
        memory=[
            SlotMemory(
                base_address=BASE * (layer + 1),
                slot_bytes=SLOT_BYTES,
                num_slots=count,
                slot_neurons=held,
            )
            for layer, count in enumerate(slots)
        ],
        home_address_LE=home_LE,
        max_tokens=4,
        device=KERNEL_DEVICE,
        kernels=kernels,
        **kwargs,
    )


def same_state(one: DeviceCache, other: DeviceCache) -> None:
    """Everything that a cache holds; of its active lists, what means anything."""
    for fields in (
        *("keep_LE", "present_LE", "address_LE", "counters_LX", "needed_LE", "displaced_LE"),
        *("cache.used_L1", "cache.slot_of_LE", "cache.prefetched_LE", "cache.usage.resident_LE"),
        *("cache.usage.step_L1", "cache.usage.last_use_LE", "cache.usage.inserted_LE"),
        *("cache.usage.use_count_LE", "cache.usage.visits_LE"),
    ):
        mine, theirs = (functools.reduce(getattr, fields.split("."), c) for c in (one, other))
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=fields)
    for layer in range(len(one.memory)):
        mine, theirs = one.active(layer), other.active(layer)
        assert (num := int(mine.num_1)) == int(theirs.num_1)
        for mine_A, theirs_A in zip(mine[1:], theirs[1:], strict=True):
            assert torch.equal(mine_A[:num], theirs_A[:num])
