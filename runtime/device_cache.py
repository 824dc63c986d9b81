"""The expert cache on the device: the same books as `runtime.cache`, kept without the host.

A `DeviceCache` owns an `ExpertCache`'s state on the device and changes it by one kernel launch per
layer. It adds what the expert kernel must know: at which address each expert lies, and how much of
it. An expert's weights may be in its slot as a **prefix**: its first ``present`` neurons, a
multiple of 64; the rest is read at home, in pinned host memory. So a whole resident expert, a miss,
MoEpic's tops and a prefetch that got half-way are one and the same.

Scores are computed for all layers at once, before a forward pass (`advance`). Policies are
elementwise (`Policy.keep_scores`), so what the event itself changes about the experts that it needs
does not matter: they are protected.

Shape letters: L MoE layers · E experts per layer · K experts per token · T tokens · C slots ·
F expert FFN inner size · A entries of an active list · X counters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.cache import ExpertCache
from runtime.policies.base import Policy

COUNTERS = (
    *("accesses", "hits", "misses", "streamed", "evictions", "missed_neurons"),
    *("prefetched", "prefetched_neurons", "wasted", "wasted_neurons", "used_neurons"),
    *("displaced", "regretted"),
)
"""Columns of `DeviceCache.counters_LX`: experts, or neurons of them.

What was prefetched, and evicted before any use, is wasted: all of its neurons that had come; what
is needed first is used, as far as it had come. What a prefetch evicts counts among the evictions,
and is displaced. It is regretted if it is missed before everything prefetched in its layer has been
used, or has gone: an upper bound, since some of it would have gone by itself. What lands beside the
slots (`runtime.prefetch.landing`) is used or wasted at its layer's event, and displaces nothing.
"""
CHUNK_NEURONS = 64  # a prefix ends at a multiple of it, or at the slot's end


class Active(NamedTuple):
    """The experts that a layer's latest event needs, misses first, then ascending ids.

    Only the first ``num_1`` entries mean anything. Addresses are of a record's first byte.
    """

    num_1: Tensor  # int32
    expert_A: Tensor  # int32
    slot_address_A: Tensor  # int64, 0 = no slot: read in place and not kept
    present_A: Tensor  # int32, neurons that the slot held before the event


class Landed(NamedTuple):
    """What a prefetch has put beside the slots, for the experts of one layer's next event.

    A record at the address holds what the expert's slot does not, up to the neuron ``until``.
    """

    address_E: Tensor  # int64
    until_E: Tensor  # int32, 0 = nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotMemory:
    """Where one layer's slots lie.

    Args:
        base_address: Of slot 0.
        slot_bytes: From one slot to the next.
        num_slots: C.
        slot_neurons: How many of an expert's neurons fit: all F, or a multiple of 64 below.
    """

    base_address: int
    slot_bytes: int
    num_slots: int
    slot_neurons: int


class DeviceCache:
    """The state of one cache on a device, and the event that changes it.

    Args:
        policy: Scores what is worth keeping.
        num_experts: E.
        top_k: K.
        num_neurons: F.
        memory: Each layer's slots.
        home_address_LE: int64, every expert's record in memory that the device can read.
        max_tokens: The most tokens of one event.
        device: Where the state lives.
        with_prefetch: Let a `runtime.device_prefetch.DevicePrefetch` fetch, and count its waste.
        kernels: Use the Triton kernel; False runs the reference in torch, which waits for nothing
            either but takes some sixty launches.

    Attributes:
        cache: The books; tensors that the kernel updates.
        keep_LE: float32, the next event's scores.
        present_LE: int32, neurons of each expert that lie in its slot.
        address_LE: int64, the record of a resident expert in its slot, of others at home.
        needed_LE: bool, what each layer's latest event needed.
        displaced_LE: bool, what has gone for a prefetch that is not used yet; None without.
        has_kernels: Whether they are used.
        counters_LX: int64, `COUNTERS` since the last `reset`.

    Raises:
        ValueError: A slot holds no multiple of 64 neurons, or shapes disagree.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_experts: int,
        top_k: int,
        num_neurons: int,
        memory: Sequence[SlotMemory],
        home_address_LE: Tensor,
        max_tokens: int,
        device: torch.device | str,
        with_prefetch: bool = False,
        kernels: bool = True,
    ) -> None:
        L, E = len(memory), num_experts
        if home_address_LE.shape != (L, E):
            raise ValueError(
                f"home_address_LE has shape {tuple(home_address_LE.shape)}: not {L, E}"
            )
        for layer, slots in enumerate(memory):
            held = slots.slot_neurons
            part = 0 < held < num_neurons and held % CHUNK_NEURONS == 0
            if held != num_neurons and not part:
                raise ValueError(
                    f"layer {layer}: slot_neurons={held} must be F={num_neurons} or a multiple of "
                    f"{CHUNK_NEURONS} below"
                )
        self.policy, self.memory = policy, tuple(memory)
        self.num_neurons, self.max_tokens = num_neurons, max_tokens
        self.cache = ExpertCache(
            policy,
            num_layers=L,
            num_experts=E,
            slots=torch.tensor([slots.num_slots for slots in memory]),
            max_needed=min(E, max_tokens * top_k),
            with_prefetch=with_prefetch,
            device=device,
        )
        active = min(E, max_tokens * top_k)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keep_LE = zeros(L, E, dtype=torch.float32)
        self.present_LE = zeros(L, E, dtype=torch.int32)
        self.home_address_LE = home_address_LE.to(device)
        self.address_LE = self.home_address_LE.clone()
        self.counters_LX = zeros(L, len(COUNTERS), dtype=torch.int64)
        self.needed_LE = zeros(L, E, dtype=torch.bool)
        self.displaced_LE = zeros(L, E, dtype=torch.bool) if with_prefetch else None
        self._active = [
            Active(
                zeros(1, dtype=torch.int32),
                zeros(active, dtype=torch.int32),
                zeros(active, dtype=torch.int64),
                zeros(active, dtype=torch.int32),
            )
            for _ in range(L)
        ]
        self._ids_E = torch.arange(E, device=device)
        self._is_due = [False] * L
        self._forecast_LE: Tensor | None = None
        self.has_kernels = kernels

    def active(self, layer: int) -> Active:
        """What the layer's latest event needs; static tensors."""
        return self._active[layer]

    def advance(self, forecast_LE: Tensor | None = None) -> None:
        """A forward pass begins: the next event of every layer is at hand.

        Args:
            forecast_LE: float32 [L, E], for policies that read one (`policies.base.later_use`).
                It is kept, and read again where a prefetch changes what a score reads.
        """
        self._is_due = [True] * len(self.memory)
        self._forecast_LE = forecast_LE
        usage = self.cache.usage
        usage.step_L1.add_(1)
        for half_life, uses_LE in usage.decayed_uses.items():
            uses_LE.mul_(0.5 ** (1.0 / half_life))
        _put(self.policy.keep_scores(usage, forecast_LE), self.keep_LE)

    def rescore(self, layer: int, forecast_E: Tensor) -> None:
        """Score one layer anew, before its `step`: its predictor knows more by now."""
        usage = self.cache.layer_usage(layer)
        _put(self.policy.keep_scores(usage, forecast_E), self.keep_LE[layer])

    def is_due(self, layer: int) -> bool:
        """Whether this forward pass has begun and the layer's event in it is still to come."""
        return self._is_due[layer]

    def rescore_arrivals(self, layer: int, arrived_E: Tensor) -> None:
        """Score anew what a prefetch has brought: its arrival counts as a use, or an insertion.

        Only where the layer's event is due, since `advance` scores for the next pass; and only for
        policies that read either.
        """
        if self._is_due[layer] and self.policy.uses & {"last_use", "inserted"}:
            usage, forecast_LE = self.cache.layer_usage(layer), self._forecast_LE
            forecast_E = None if forecast_LE is None else forecast_LE[layer]
            keep_E = self.keep_LE[layer]
            torch.where(arrived_E, self.policy.keep_scores(usage, forecast_E), keep_E, out=keep_E)

    def step(self, layer: int, topk_expert_ids_TK: Tensor) -> Active:
        """Serve one event, as `ExpertCache.step` does; returns what the expert kernel must know.

        What is needed and has a slot counts as present from here on: the expert kernel that follows
        puts it there (write-through), or a copy in between does.
        """
        self._is_due[layer] = False
        if self.has_kernels:
            self._launch(layer, topk_expert_ids_TK)
        else:
            self._reference(layer, topk_expert_ids_TK)
        for uses_LE in self.cache.usage.decayed_uses.values():
            uses_LE[layer].add_(self.needed_LE[layer])
        return self._active[layer]

    def readdress(self, layer: int) -> None:
        """Say where a layer's experts lie, after another than `step` has changed the books."""
        self.address_LE[layer].copy_(self._address_E(layer))

    def reset(self) -> None:
        """Empty the cache, forget usage and counts; in place."""
        self.cache.reset()
        self.present_LE.zero_()
        self.counters_LX.zero_()
        self.address_LE.copy_(self.home_address_LE)
        if self.displaced_LE is not None:
            self.displaced_LE.zero_()
        self._is_due = [False] * len(self.memory)

    def check_integrity(self) -> None:
        """AssertionError if the books do not balance; for tests and idle moments."""
        self.cache.check_integrity()
        resident_LE = self.cache.usage.resident_LE
        for layer, slots in enumerate(self.memory):
            address_E = self._address_E(layer)
            assert torch.equal(self.address_LE[layer], address_E), "an address is not its slot's"
            assert bool((self.present_LE[layer] <= slots.slot_neurons).all()), "more than fits"
        assert bool((self.present_LE[~resident_LE] == 0).all()), "absent but present"

    def _address_E(self, layer: int) -> Tensor:
        """Each expert's slot, or its home, by the books."""
        slots, slot_of_LE = self.memory[layer], self.cache.slot_of_LE
        assert slot_of_LE is not None
        slot_of_E = slot_of_LE[layer]
        here_E = slots.base_address + slot_of_E * slots.slot_bytes
        return torch.where(slot_of_E >= 0, here_E, self.home_address_LE[layer])

    def _launch(self, layer: int, topk_expert_ids_TK: Tensor) -> None:
        from runtime.kernels.cache_step import cache_step  # triton is there only on GPU machines

        usage, slots, active = self.cache.usage, self.memory[layer], self._active[layer]
        prefetched_LE = self.cache.prefetched_LE
        assert self.cache.slot_of_LE is not None
        cache_step(
            topk_expert_ids_TK,
            capacity=slots.num_slots,
            num_neurons=self.num_neurons,
            slot_neurons=slots.slot_neurons,
            slot_base=slots.base_address,
            slot_bytes=slots.slot_bytes,
            uses=self.policy.uses,
            used_1=self.cache.used_L1[layer],
            step_1=usage.step_L1[layer],
            resident_E=usage.resident_LE[layer],
            slot_of_E=self.cache.slot_of_LE[layer],
            last_use_E=usage.last_use_LE[layer],
            inserted_E=usage.inserted_LE[layer],
            use_count_E=usage.use_count_LE[layer],
            visits_E=usage.visits_LE[layer],
            prefetched_E=None if prefetched_LE is None else prefetched_LE[layer],
            displaced_E=None if self.displaced_LE is None else self.displaced_LE[layer],
            needed_E=self.needed_LE[layer],
            keep_E=self.keep_LE[layer],
            present_E=self.present_LE[layer],
            home_E=self.home_address_LE[layer],
            address_E=self.address_LE[layer],
            num_active_1=active.num_1,
            active_expert_A=active.expert_A,
            active_slot_A=active.slot_address_A,
            active_present_A=active.present_A,
            counters_X=self.counters_LX[layer],
        )

    def _reference(self, layer: int, topk_expert_ids_TK: Tensor) -> None:
        """What the kernel does, by way of `ExpertCache.step` on scores that are known already."""
        E, num_active = self.cache.num_experts, len(self._active[layer].expert_A)
        ids_N = topk_expert_ids_TK.flatten().clamp(max=E)
        needed_E = torch.zeros(E + 1, dtype=torch.bool, device=ids_N.device).index_fill_(
            0, ids_N, True
        )[:E]
        self.needed_LE[layer] = needed_E
        usage = self.cache.usage
        usage.step_L1[layer] -= 1  # `advance` has counted the event, and so does `step`
        decayed = {half_life: uses_LE.clone() for half_life, uses_LE in usage.decayed_uses.items()}
        prefetched_LE = self.cache.prefetched_LE
        unused_E = None if prefetched_LE is None else prefetched_LE[layer].clone()
        self.cache.policy = _Given(self.policy, self.keep_LE[layer])
        try:
            step = self.cache.step(needed_E, layer=layer)
        finally:
            self.cache.policy = self.policy
        for half_life, uses_LE in usage.decayed_uses.items():
            uses_LE.copy_(decayed[half_life])
        self.readdress(layer)
        slots, active = self.memory[layer], self._active[layer]
        resident_E = usage.resident_LE[layer]
        present_E = self.present_LE[layer] * step.hit_LE
        miss_E = step.insert_LE | step.streamed_LE
        active.num_1.copy_(needed_E.sum(0, keepdim=True))
        behind_E = torch.where(miss_E, 0, torch.where(step.hit_LE, E, 2 * E))
        order_A = (behind_E + self._ids_E).argsort()[:num_active]
        active.expert_A.copy_(order_A)
        active.slot_address_A.copy_(torch.where(resident_E, self.address_LE[layer], 0)[order_A])
        active.present_A.copy_(present_E[order_A])
        counted = {
            "accesses": needed_E,
            "hits": step.hit_LE,
            "misses": miss_E,
            "streamed": step.streamed_LE,
            "evictions": step.evict_LE,
            "missed_neurons": needed_E * (self.num_neurons - present_E),
        }
        if prefetched_LE is not None and unused_E is not None and self.displaced_LE is not None:
            assert step.wasted_LE is not None
            displaced_E = self.displaced_LE[layer]
            counted["wasted"] = step.wasted_LE
            counted["wasted_neurons"] = step.wasted_LE * self.present_LE[layer]
            counted["used_neurons"] = unused_E * present_E
            counted["regretted"] = displaced_E & miss_E
            self.displaced_LE[layer] = displaced_E & ~needed_E & prefetched_LE[layer].any()
        for name, counted_E in counted.items():
            self.counters_LX[layer, COUNTERS.index(name)] += counted_E.sum()
        self.present_LE[layer].masked_fill_(step.evict_LE, 0)
        self.present_LE[layer].masked_fill_(needed_E & resident_E, slots.slot_neurons)


def _put(scores: Tensor, place: Tensor) -> None:
    """Copy, unless they are there: a policy may hand on what was forecast in place."""
    if scores.data_ptr() != place.data_ptr() or scores.shape != place.shape:
        place.copy_(scores.expand_as(place))


class _Given(Policy):
    """A policy's bookkeeping with scores that were computed before."""

    name = "given"

    def __init__(self, policy: Policy, keep_E: Tensor) -> None:
        self.uses, self.half_lives = policy.uses, policy.half_lives
        self._keep_E = keep_E

    def keep_scores(self, usage: object, forecast_LE: Tensor | None) -> Tensor:
        """Those scores."""
        return self._keep_E
