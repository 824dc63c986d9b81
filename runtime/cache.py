"""The expert cache: who is resident, who must go, and in which slot the newcomer lands.

It decides, and moves nothing: weights, copies and clocks belong to its callers. Everything in
`ExpertCache.step` and `ExpertCache.prefetch` is a fixed-shape tensor program over preallocated
state (`runtime.policies.base` lists what a captured CUDA graph demands), so the simulator, the CPU
runtime and the graph run the same decisions. Only the event log and `check_integrity`
look at values from Python.

One **step** is event-atomic. For one layer and everything a batch of tokens needs there:

1. everything needed is protected, and hits are counted, before anything moves;
2. a miss takes free room, or evicts the unprotected resident expert with the lowest keep-score,
   ties by expert id;
3. what does not fit beside the protected experts is *streamed*: read in place, never resident. Room
   goes to the misses in ascending expert id.

Slots fill from 0 upwards and are never emptied, only handed on, so a layer's n resident experts
always hold slots 0..n-1. Newcomers, by ascending expert id, take the free slots first, in order,
and then their victims' slots, by ascending id of the victim.

A cache may hold its experts per layer (L caches of `slots`), or in one pool: then it has a single
layer of all L*E experts, and `budget_bytes` with `expert_bytes_LE` where experts differ in size.

Shape letters: L MoE layers · E experts per layer. Any leading dimensions ``...`` are variants of
one cache (budgets, policies) that see the same accesses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from runtime.policies.base import Policy, Usage
from runtime.selection import MAX_EXPERTS, count, hand_on_slots, lowest

EventKind = Literal["hit", "hit_pending", "miss", "evict", "prefetch", "wasted", "streamed"]
"""``hit_pending`` is reserved for runtimes with asynchronous copies; this cache never emits it."""


class Event(NamedTuple):
    """One state change, in the order in which the log has them."""

    step: int
    layer: int
    kind: EventKind
    expert: int


class Step(NamedTuple):
    """What one event changed; masks are bool, of the cache's shape ([..., E] for a single layer).

    hit_LE and the misses (insert_LE | streamed_LE) say what was found at router time. The counts
    (int64 [..., L, 1], or [..., 1]) are the sums of their masks.
    """

    hit_LE: Tensor  # needed and resident before the step
    insert_LE: Tensor  # comes in: copy it to its slot
    evict_LE: Tensor  # gave its room away
    streamed_LE: Tensor  # needed, absent and without room: read it in place
    wasted_LE: Tensor | None  # evicted, prefetched and never used; None without prefetch
    slot_of_LE: Tensor | None  # int64 slot of each expert after the step, -1 = none; the live state
    num_hits_L1: Tensor
    num_inserts_L1: Tensor
    num_evictions_L1: Tensor
    num_streamed_L1: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """Every tensor of the cache; ``layer(l)`` gives views of one layer, which share storage."""

    usage: Usage
    capacity_L1: Tensor  # in units: slots, or bytes in a pool of bytes
    used_L1: Tensor
    bytes_LE: Tensor | None
    slot_of_LE: Tensor | None
    prefetched_LE: Tensor | None  # resident, by prefetch, and not used yet

    def sizes(self, mask_LE: Tensor) -> Tensor:
        """What each marked expert takes: its slot, or its bytes."""
        return mask_LE if self.bytes_LE is None else mask_LE * self.bytes_LE

    def units(self, mask_LE: Tensor) -> Tensor:
        """What the marked experts of each layer take together, [..., L, 1]."""
        return count(self.sizes(mask_LE))

    def layer(self, layer: int) -> "_State":
        def views(owner: Any, *without: str) -> dict[str, Any]:
            values = {f.name: getattr(owner, f.name) for f in fields(owner)}
            return {
                name: None if value is None else value[..., layer, :]
                for name, value in values.items()
                if name not in without
            }

        decayed = {h: uses[..., layer, :] for h, uses in self.usage.decayed_uses.items()}
        usage = Usage(decayed_uses=decayed, **views(self.usage, "decayed_uses"))
        return _State(usage=usage, **views(self, "usage"))


class ExpertCache:
    """The state of one cache (or of many variants of it) and the steps that change it.

    Args:
        policy: Scores what is worth keeping.
        num_layers: L; 1 for a pool.
        num_experts: E; all experts of the model for a pool.
        slots: Slots per layer: one number, or an integer tensor that broadcasts to [..., L].
        budget_bytes: Instead of slots: bytes per layer (in all, for a pool), likewise.
        expert_bytes_LE: int64 sizes [L, E], needed with `budget_bytes`.
        variants: Leading dimensions of the state.
        max_needed: The most experts that a step may need in one layer; E if not told. A promise of
            the caller's which keeps the selection small; `step` can be told per call.
        with_slots: Keep `slot_of_LE`. Variants that move no bytes do without; byte budgets have no
            equal slots and must.
        with_prefetch: Allow `prefetch`, and track what it wastes.
        record_events: Keep a log of `events`. For runs on the host only, without variants.
        device: Where the state lives.

    Raises:
        ValueError: A size is out of range, or arguments contradict each other.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_layers: int,
        num_experts: int,
        slots: int | Tensor | None = None,
        budget_bytes: int | Tensor | None = None,
        expert_bytes_LE: Tensor | None = None,
        variants: Sequence[int] = (),
        max_needed: int | None = None,
        with_slots: bool = True,
        with_prefetch: bool = False,
        record_events: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_layers < 1 or not 1 <= num_experts <= MAX_EXPERTS:
            raise ValueError(
                f"{num_layers} layers x {num_experts} experts: at least 1 layer, "
                f"and 1..{MAX_EXPERTS} experts"
            )
        if (slots is None) == (budget_bytes is None):
            raise ValueError("give either slots or budget_bytes")
        if (budget_bytes is None) != (expert_bytes_LE is None):
            raise ValueError("expert_bytes_LE goes with budget_bytes, and only with it")
        if budget_bytes is not None and with_slots:
            raise ValueError("a budget in bytes has no equal slots: with_slots must be False")
        if record_events and tuple(variants):
            raise ValueError(f"variants={tuple(variants)}: events are recorded for one cache only")
        shape = (*variants, num_layers, num_experts)
        capacity = slots if budget_bytes is None else budget_bytes
        capacity_L1 = (
            torch.as_tensor(capacity, dtype=torch.int64, device=device)
            .expand(shape[:-1])
            .unsqueeze(-1)
            .clone()
        )
        # The only look at values, before any step: bounds that make the program's shapes static.
        self._min_units, max_units = int(capacity_L1.min()), int(capacity_L1.max())
        self._min_bytes = self._max_bytes = 1
        if expert_bytes_LE is not None:
            self._min_bytes = int(expert_bytes_LE.min())
            self._max_bytes = int(expert_bytes_LE.max())
            if self._min_bytes < 1 or max_units < self._min_bytes:
                raise ValueError(
                    f"budget_bytes={max_units} with experts of {self._min_bytes} bytes and more: "
                    "sizes must be positive and one expert must fit"
                )
        elif not 0 <= self._min_units <= max_units <= num_experts or max_units < 1:
            raise ValueError(f"slots={slots}: must be in 1..{num_experts}, the experts per layer")
        self.policy = policy
        self.num_layers, self.num_experts = num_layers, num_experts
        self.max_needed = num_experts if max_needed is None else min(max_needed, num_experts)
        self.record_events = record_events
        self.events: list[Event] = []

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Accesses are the same for all variants; a prefetch, which counts as one, is not.
        access_shape = shape if with_prefetch else shape[-2:]
        self._state = _State(
            usage=Usage(
                step_L1=zeros(num_layers, 1),
                resident_LE=zeros(*shape, dtype=torch.bool),
                last_use_LE=zeros(*access_shape),
                inserted_LE=zeros(*shape),
                use_count_LE=zeros(*shape[-2:]),
                visits_LE=zeros(*shape),
                decayed_uses={
                    half_life: zeros(*shape[-2:], dtype=torch.float32)
                    for half_life in policy.half_lives
                },
            ),
            capacity_L1=capacity_L1,
            used_L1=zeros(*shape[:-1], 1),
            bytes_LE=None
            if expert_bytes_LE is None
            else expert_bytes_LE.to(device, torch.int64).expand(shape),
            slot_of_LE=zeros(*shape).fill_(-1) if with_slots else None,
            prefetched_LE=zeros(*shape, dtype=torch.bool) if with_prefetch else None,
        )
        self._layers = [self._state.layer(layer) for layer in range(num_layers)]
        self._ids_E = torch.arange(num_experts, device=device)

    @property
    def usage(self) -> Usage:
        """The live state that policies see, `Usage.resident_LE` among it."""
        return self._state.usage

    def layer_usage(self, layer: int) -> Usage:
        """One layer's view of `usage`."""
        return self._layers[layer].usage

    @property
    def slot_of_LE(self) -> Tensor | None:
        """int64 slot of each expert, -1 = not resident; the live state. None without slots."""
        return self._state.slot_of_LE

    @property
    def prefetched_LE(self) -> Tensor | None:
        """bool: resident by prefetch and not used yet; the live state. None without prefetch."""
        return self._state.prefetched_LE

    @property
    def used_L1(self) -> Tensor:
        """Slots (or bytes) in use; the live state."""
        return self._state.used_L1

    def reset(self) -> None:
        """Empty the cache and forget all usage, in place."""
        state = self._state
        tensors = [getattr(state.usage, f.name) for f in fields(Usage) if f.name != "decayed_uses"]
        for tensor in (*tensors, *state.usage.decayed_uses.values(), state.used_L1):
            tensor.zero_()
        if state.slot_of_LE is not None:
            state.slot_of_LE.fill_(-1)
        if state.prefetched_LE is not None:
            state.prefetched_LE.zero_()
        self.events.clear()

    def step(
        self,
        needed_LE: Tensor,
        *,
        layer: int | None = None,
        forecast_LE: Tensor | None = None,
        max_needed: int | None = None,
    ) -> Step:
        """Serve one event: demand everything in ``needed_LE`` at once. Changes the state.

        Args:
            needed_LE: bool [L, E], or [E] for one layer; the same for all variants.
            layer: The layer that is served, or None for all of them at once (each its own event).
            forecast_LE: float32, what the policy is to know of the time after this event
                (`policies.base.later_use`); [..., L, E], or [..., E] for one layer.
            max_needed: The most experts that are needed in a layer, if fewer than promised before.
        """
        state = self._state if layer is None else self._layers[layer]
        usage, policy = state.usage, self.policy
        resident_LE = usage.resident_LE
        max_needed = self.max_needed if max_needed is None else max_needed
        usage.step_L1.add_(1)
        if "last_use" in policy.uses:
            torch.where(needed_LE, usage.step_L1, usage.last_use_LE, out=usage.last_use_LE)
        if "use_count" in policy.uses:
            usage.use_count_LE.add_(needed_LE)
        if "visits" in policy.uses:
            usage.visits_LE.add_(needed_LE)
        for half_life, uses_LE in usage.decayed_uses.items():
            uses_LE.mul_(0.5 ** (1.0 / half_life)).add_(needed_LE)

        hit_LE = resident_LE & needed_LE
        insert_LE = miss_LE = needed_LE > resident_LE
        evictable_LE = resident_LE > needed_LE
        keep_LE = policy.keep_scores(usage, forecast_LE)
        num_needed_L1, num_misses_L1 = count(needed_LE), count(miss_LE)

        if max_needed * self._max_bytes > self._min_units:  # else everything needed always fits
            room_L1 = state.capacity_L1 - state.units(hit_LE)
            insert_LE = miss_LE & (state.sizes(miss_LE).cumsum(-1) <= room_L1)
        streamed_LE = miss_LE ^ insert_LE
        num_inserts_L1 = num_misses_L1 if insert_LE is miss_LE else count(insert_LE)
        units_in_L1 = num_inserts_L1 if state.bytes_LE is None else state.units(insert_LE)
        over_L1 = state.used_L1 + units_in_L1 - state.capacity_L1
        # Each victim frees at least the smallest expert, so that this many always suffice.
        most_victims = -(-max_needed * self._max_bytes // self._min_bytes)
        victim_LV = lowest(keep_LE, evictable_LE, most_victims)
        if state.bytes_LE is None:
            take_LV = self._ids_E[: victim_LV.shape[-1]] < over_L1
            units_out_L1 = num_evictions_L1 = over_L1.clamp(min=0)
        else:
            bytes_LV = state.bytes_LE.gather(-1, victim_LV)
            take_LV = bytes_LV.cumsum(-1) - bytes_LV < over_L1
            units_out_L1 = (bytes_LV * take_LV).sum(-1, keepdim=True)
            num_evictions_L1 = count(take_LV)
        evict_LE = torch.zeros_like(resident_LE).scatter_(-1, victim_LV, take_LV)
        wasted_LE = None if state.prefetched_LE is None else evict_LE & state.prefetched_LE
        if state.prefetched_LE is not None:
            state.prefetched_LE.logical_and_(~needed_LE)
        self._apply(state, insert_LE, evict_LE, units_in_L1 - units_out_L1)
        if self.record_events:
            self._record(
                layer,
                hit=hit_LE,
                miss=miss_LE,
                evict=evict_LE,
                wasted=wasted_LE,
                streamed=streamed_LE,
            )
        return Step(
            hit_LE,
            insert_LE,
            evict_LE,
            streamed_LE,
            wasted_LE,
            state.slot_of_LE,
            num_needed_L1 - num_misses_L1,
            num_inserts_L1,
            num_evictions_L1,
            num_misses_L1 - num_inserts_L1,
        )

    def prefetch(
        self,
        want_LE: Tensor,
        forecast_LE: Tensor,
        *,
        layer: int | None = None,
        margin: float = 0.0,
        max_fetches: int,
        victims_by_LE: Tensor | None = None,
        protected_LE: Tensor | None = None,
    ) -> Step:
        """Bring in wanted experts ahead of their use, best forecast first. Changes the state.

        Free slots are taken without more ado. An eviction pairs the best candidate with the
        resident expert of the lowest forecast, the next best with the next, and happens only while
        the candidate's forecast is higher by more than ``margin``: what demand would evict is the
        policy's matter, but a guess may only displace a worse guess.

        With ``victims_by_LE``, such as the policy's keep-scores, as many come and go, but those go
        whose score is lowest, among the residents that all who come beat by more than ``margin``.

        Args:
            want_LE: bool [..., L, E] ([..., E] for one layer); resident ones are left alone.
            forecast_LE: float32, same shape, comparable between experts of a layer.
            layer: As in `step`. The step counter stands still: no event happens.
            margin: By how much a forecast must beat its victim's.
            max_fetches: The most experts to bring into a layer, at least 1.
            victims_by_LE: float32, same shape; the lowest goes first, ties by id.
            protected_LE: bool, residents that must stay, such as those being computed just now.

        Returns:
            `insert_LE` and `evict_LE` (with `wasted_LE`, the victims that were prefetched
            themselves and never used); the other masks are empty.

        Raises:
            ValueError: The cache was built without `with_prefetch`, or its budget is in bytes.
        """
        state = self._state if layer is None else self._layers[layer]
        if state.prefetched_LE is None or state.bytes_LE is not None:
            raise ValueError("prefetch needs a cache of slots that was built with_prefetch=True")
        resident_LE = state.usage.resident_LE
        candidate_LE = want_LE > resident_LE
        evictable_LE = resident_LE if protected_LE is None else resident_LE > protected_LE
        forecast_LE = forecast_LE.expand(resident_LE.shape)
        newcomer_LV = lowest(-forecast_LE, candidate_LE, max_fetches)
        victim_LV = lowest(forecast_LE, evictable_LE, max_fetches)
        rank_V = self._ids_E[:max_fetches]
        # Newcomer j takes a free slot, or the place of victim j - free.
        free_L1 = state.capacity_L1 - state.used_L1
        victim_of_LV = victim_LV.gather(-1, (rank_V - free_L1).clamp(min=0))
        beats_LV = (
            forecast_LE.gather(-1, newcomer_LV) > forecast_LE.gather(-1, victim_of_LV) + margin
        ) & evictable_LE.gather(-1, victim_of_LV)
        come_LV = candidate_LE.gather(-1, newcomer_LV) & ((rank_V < free_L1) | beats_LV)
        num_inserts_L1 = count(come_LV)
        num_victims_L1 = (num_inserts_L1 - free_L1).clamp(min=0)
        if victims_by_LE is not None:
            come_forecast_LV = torch.where(come_LV, forecast_LE.gather(-1, newcomer_LV), torch.inf)
            beaten_LE = come_forecast_LV.amin(-1, keepdim=True) > forecast_LE + margin
            score_LE = victims_by_LE.expand(resident_LE.shape)
            victim_LV = lowest(score_LE, evictable_LE & beaten_LE, max_fetches)
        none_LE = torch.zeros_like(resident_LE)
        insert_LE = none_LE.scatter(-1, newcomer_LV, come_LV)
        evict_LE = none_LE.scatter(-1, victim_LV, rank_V < num_victims_L1)
        wasted_LE = evict_LE & state.prefetched_LE
        self._apply(state, insert_LE, evict_LE, num_inserts_L1 - num_victims_L1)
        state.prefetched_LE.logical_or_(insert_LE)
        usage = state.usage
        torch.where(insert_LE, usage.step_L1, usage.last_use_LE, out=usage.last_use_LE)
        if self.record_events:
            self._record(layer, prefetch=insert_LE, evict=evict_LE, wasted=wasted_LE)
        none_L1 = torch.zeros_like(num_inserts_L1)
        return Step(
            none_LE,
            insert_LE,
            evict_LE,
            none_LE,
            wasted_LE,
            state.slot_of_LE,
            none_L1,
            num_inserts_L1,
            num_victims_L1,
            none_L1,
        )

    def check_integrity(self) -> None:
        """AssertionError if the books do not balance; for tests and idle moments."""
        state, resident_LE = self._state, self.usage.resident_LE
        assert bool((state.units(resident_LE) == state.used_L1).all()), "used != residents"
        assert bool((state.used_L1 <= state.capacity_L1).all()), "more residents than room"
        if state.slot_of_LE is not None:
            num_L1 = resident_LE.sum(-1, keepdim=True)
            slots_LE = torch.where(resident_LE, state.slot_of_LE, self.num_experts).sort(-1).values
            expected_LE = torch.where(self._ids_E < num_L1, self._ids_E, self.num_experts)
            assert torch.equal(slots_LE, expected_LE), "residents do not hold slots 0..n-1"
            assert bool((state.slot_of_LE[~resident_LE] == -1).all()), "an absent expert has a slot"
        if state.prefetched_LE is not None:
            assert bool((state.prefetched_LE <= resident_LE).all()), "prefetched but not resident"

    def _apply(self, state: _State, insert_LE: Tensor, evict_LE: Tensor, change_L1: Tensor) -> None:
        """Move the books: slots, residency, units in use."""
        usage = state.usage
        if state.slot_of_LE is not None:
            hand_on_slots(state.slot_of_LE, insert_LE, evict_LE, state.used_L1)
        usage.resident_LE.logical_xor_(evict_LE).logical_or_(insert_LE)
        state.used_L1.add_(change_L1)
        if "inserted" in self.policy.uses:
            torch.where(insert_LE, usage.step_L1, usage.inserted_LE, out=usage.inserted_LE)
        if "visits" in self.policy.uses:  # a stay ends with an eviction; what streams never stays
            usage.visits_LE.mul_(usage.resident_LE)
        if state.prefetched_LE is not None:
            state.prefetched_LE.logical_and_(~evict_LE)

    def _record(self, layer: int | None, **kinds: Tensor | None) -> None:
        """Append to the log: layers ascending, then kinds as given, then experts ascending."""
        for index in range(self.num_layers) if layer is None else (layer,):
            step = int(self.usage.step_L1[index])
            for kind, mask in kinds.items():
                if mask is None:
                    continue
                mask_E = mask[index] if layer is None else mask
                experts = mask_E.nonzero().flatten().tolist()
                self.events.extend(Event(step, index, kind, expert) for expert in experts)  # type: ignore[arg-type]
