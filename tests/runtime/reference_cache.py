"""A cache written as plainly as possible, which the tensor program must agree with.

Slots are equal, or experts have sizes in bytes; one layer; Python numbers only.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass
class ReferenceCache:
    """``keep(cache, expert)`` is the policy; the lowest is evicted, ties by expert id."""

    keep: Callable[["ReferenceCache", int], float]
    capacity: int
    sizes: Sequence[int]
    step: int = 0
    slot_of: dict[int, int] = field(default_factory=dict)
    last_use: dict[int, int] = field(default_factory=dict)
    inserted: dict[int, int] = field(default_factory=dict)
    use_count: dict[int, int] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)  # of residents, since they came in
    forecast: Sequence[float] = ()

    def serve(self, needed: set[int]) -> tuple[set[int], set[int], set[int], set[int]]:
        """Hits, inserted, evicted, streamed of one event."""
        self.step += 1
        for expert in needed:
            self.last_use[expert] = self.step
            self.use_count[expert] = self.use_count.get(expert, 0) + 1
        hits = needed & set(self.slot_of)
        for expert in hits:
            self.visits[expert] += 1
        misses = sorted(needed - hits)

        room = self.capacity - sum(self.sizes[expert] for expert in hits)
        inserted: list[int] = []
        for expert in misses:
            room -= self.sizes[expert]
            if room < 0:
                break
            inserted.append(expert)
        streamed = set(misses) - set(inserted)

        freed_slots: dict[int, int] = {}
        num_before = len(self.slot_of)
        incoming = sum(self.sizes[expert] for expert in inserted)
        while sum(self.sizes[e] for e in self.slot_of) + incoming > self.capacity:
            unprotected = set(self.slot_of) - needed
            victim = min(unprotected, key=lambda expert: (self.keep(self, expert), expert))
            freed_slots[victim] = self.slot_of.pop(victim)

        num_free = max(0, len(inserted) - len(freed_slots))
        offered = list(range(num_before, num_before + num_free))
        offered += [freed_slots[victim] for victim in sorted(freed_slots)]
        for expert, slot in zip(inserted, offered, strict=False):  # sizes can free more than needed
            self.slot_of[expert] = slot
            self.inserted[expert] = self.step
            self.visits[expert] = 1
        return hits, set(inserted), set(freed_slots), streamed


def age(cache: ReferenceCache, expert: int) -> int:
    return cache.step - cache.last_use.get(expert, 0)


def splitmix(step: int, expert: int) -> int:
    """The bits of `runtime.policies.random` for seed 0, in unsigned 64-bit arithmetic."""
    wrap = 1 << 64
    bits = (step * 0x9E3779B97F4A7C15 + expert * 0xBF58476D1CE4E5B9) % wrap
    for _ in range(2):
        bits = (bits ^ (bits >> 32)) * 0x94D049BB133111EB % wrap
    return bits >> 40


KEEP: dict[str, Callable[[ReferenceCache, int], float]] = {
    "fifo": lambda cache, expert: cache.inserted.get(expert, 0),
    "lru": lambda cache, expert: cache.last_use.get(expert, 0),
    "lfu": lambda cache, expert: cache.use_count[expert] + 1 / (age(cache, expert) + 2),
    "lfru": lambda cache, expert: float32(cache.use_count[expert] / (age(cache, expert) + 1)),
    "lcp": lambda cache, expert: float32(
        cache.use_count[expert] * 0.25 ** (age(cache, expert) / 128)
    ),
    "least_stale": lambda cache, expert: cache.last_use.get(expert, 0),
    "random": lambda cache, expert: splitmix(cache.step, expert),
    "finemoe": lambda cache, expert: float32(
        max(cache.forecast[expert], 2.0**-40) * cache.visits[expert]
    ),
    "forecast": lambda cache, expert: cache.forecast[expert],
    "belady": lambda cache, expert: cache.forecast[expert],
}


def next_uses(events: Sequence[set[int]], num_experts: int) -> list[list[float]]:
    """Minus the number of the next event after t that needs each expert; -inf = none."""
    rows, nearest = [], [-math.inf] * num_experts
    for t in reversed(range(len(events))):
        rows.append(list(nearest))
        for expert in events[t]:
            nearest[expert] = -float(t)
    return rows[::-1]
