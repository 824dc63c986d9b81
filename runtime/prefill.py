"""Long prompts: every MoE layer as one event, its missing experts streamed at link speed.

`PrefillExecutor.forward` is a layer's routed part for T tokens, hundreds or thousands, that need
nearly every expert. The cache is stepped once (the same event as in the simulator); then experts
are computed in ascending order, each by plain matrix products on strided views of its record:

- a resident expert where it lies in its slot;
- a newcomer in its slot, into which its record is copied directly;
- what has no room in one of a few staging buffers.

Copies run on a stream of their own, in the same order and as far ahead as staging allows, so the
copy of experts i+1.. runs while i computes. After the last expert of a layer the buffers that come
free take the first absent experts of the next layer, which arrive during its attention; what its
router then does not ask for is dropped and counted as wasted.

Experts are summed in ascending order, and their tokens multiplied in the stock models' order,
whatever lies where: residency never changes a bit. The host waits for the device once per layer,
for what the router and the cache decided. Memory beside the staging buffers is bounded by the
tokens given: longer prompts are cut by the caller (`runtime.prefill_chunks`).

Knows nothing of policies, decode or how memory was planned. On a CPU the same code runs with every
copy done at once.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · D hidden ·
F expert FFN inner size · R rows per inner neuron · C slots · S staging buffers · N = T*K token
entries · P elements of a record.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runtime.cache import ExpertCache
from runtime.expert_layout import ExpertLayout
from runtime.experts import expert_forward
from runtime.metrics import Counters

MAX_ROWS = 2048  # tokens of one expert that are computed at once: bounds what is between products


class RecordSource(Protocol):
    """Where experts' home records lie: pinned memory, or a memory-mapped file."""

    def record_P(self, layer: int, expert: int) -> Tensor:
        """One expert's record on the host; never written to."""
        ...


@dataclass(slots=True)
class PrefillStats:
    """What prefill has moved; bytes that crossed the link.

    Attributes:
        link_bytes: All of them.
        prefetched_bytes: Those that were copied before their layer's router spoke.
        wasted_bytes: Those of the prefetched that it then did not ask for.
        events: Layers that were served.
    """

    link_bytes: int = 0
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A record, whole once ``ready`` has happened; ``buffer`` is the staging buffer it is in."""

    record_P: Tensor
    ready: Any
    buffer: int | None


class _Lane:
    """The copy stream and its order with the stream that computes; on a CPU all is in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Any:
        """The moment at which everything that was given to the compute stream so far is done."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._stream.device).record_event()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], *after: Any) -> Any:
        """Copy (target, source) pairs once ``after`` have happened; returns when that is done."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            for event in after:
                if event is not None:
                    self._stream.wait_event(event)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def join(self, event: Any) -> None:
        """Let the compute stream wait for ``event``."""
        if self._stream is not None and event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)


class PrefillExecutor:
    """Computes the routed part of MoE layers for many tokens at once.

    Args:
        home: The experts' home records; pinned where the device is a GPU, else copies are slow.
        layout: Of the records.
        experts: Each MoE layer's experts module, for its activation.
        slots_LCP: Each layer's slots [C, elements]. Of fewer elements than a record, they hold the
            first ``elements // (R * D)`` neurons of each expert and nothing of the tail.
        cache: Steps the residency; its tensors lie on ``device``.
        staging_SP: The staging buffers, [S, P]; S may be 0 where every expert has a whole slot.
        present_LE: int32 on ``device``: leading neurons that are valid in an expert's slot; None
            where a resident expert's slot always holds all that it can. Kept up to date.
        counters: Where events are counted, on ``device``; None makes its own.

    Raises:
        ValueError: There is no staging buffer and some slots are missing or partial.
    """

    def __init__(
        self,
        *,
        home: RecordSource,
        layout: ExpertLayout,
        experts: Sequence[nn.Module],
        slots_LCP: Sequence[Tensor],
        cache: ExpertCache,
        staging_SP: Tensor,
        present_LE: Tensor | None = None,
        counters: Counters | None = None,
    ) -> None:
        num_experts = cache.num_experts
        whole = all(
            slots_CP.shape == (num_experts, layout.record_elements) for slots_CP in slots_LCP
        )
        if not len(staging_SP) and not whole:
            raise ValueError(
                f"no staging buffer: with fewer than {num_experts} whole slots in every layer at "
                "least one is needed"
            )
        self._home, self._layout, self._experts = home, layout, experts
        self._slots_LCP, self._cache, self._staging_SP = slots_LCP, cache, staging_SP
        self._neuron_elements = layout.num_rows * layout.hidden_size
        full = layout.expert_intermediate_size
        self._capacity_L = [
            full if s.shape[1] >= layout.record_elements else s.shape[1] // self._neuron_elements
            for s in slots_LCP
        ]
        self._present_LE = present_LE
        device = staging_SP.device
        self.counters = counters or Counters(cache.num_layers, device=device)
        self.stats = PrefillStats()
        self._lane = _Lane(device)
        # Buffers that may be written to once their event has happened, the longest free first.
        self._free: deque[tuple[int, Any]] = deque((s, None) for s in range(len(staging_SP)))
        self._early: dict[int, _Arrival] = {}  # of the layer `_early_layer`, copied ahead of it
        self._early_layer = -1

    def forget(self) -> None:
        """Start counting anew."""
        self.counters = Counters(self._cache.num_layers, device=self._staging_SP.device)
        self.stats = PrefillStats()

    def forward(
        self,
        layer: int,
        hidden_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        forecast_E: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts: [T, D] in the dtype of ``hidden_TD``.

        Args:
            layer: The MoE layer; one event of its cache.
            hidden_TD: What the experts are applied to.
            topk_expert_ids_TK: Experts of each token, each once; ids of E and above are skipped.
            topk_weights_TK: Their weights.
            forecast_E: What the policy is to know of the time after this event.
        """
        num_tokens, top_k = topk_expert_ids_TK.shape
        output_TD = torch.zeros_like(hidden_TD)
        if not num_tokens:
            return output_TD
        num_experts = self._cache.num_experts
        # Entry k * T + t: an expert's tokens come in the order in which stock models multiply them,
        # and where in a product a row stands may change its last bit.
        ids_N = topk_expert_ids_TK.T.flatten().clamp(max=num_experts).long()
        counts = ids_N.new_zeros(num_experts + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))
        order_N = ids_N.argsort(stable=True)
        token_N = order_N % num_tokens
        weight_N1 = topk_weights_TK.T.flatten()[order_N, None]
        counts_E, slot_E, present_E, next_present_E = self._step(
            layer, counts[:num_experts], min(num_experts, num_tokens * top_k), forecast_E
        )
        needed = [expert for expert in range(num_experts) if counts_E[expert]]
        arrivals = self._arrivals(layer, needed, slot_E, present_E)
        start = 0
        for expert in needed:
            arrival = next(arrivals)
            self._lane.join(arrival.ready)
            end = start + counts_E[expert]
            for first in range(start, end, MAX_ROWS):
                rows = slice(first, min(first + MAX_ROWS, end))
                token_M = token_N[rows]
                expert_output_MD = expert_forward(
                    self._experts[layer], self._layout, arrival.record_P, hidden_TD[token_M]
                )
                weighted_MD = (expert_output_MD * weight_N1[rows]).to(output_TD.dtype)
                # A token is in an expert's list once, so that nothing is added twice at a time.
                output_TD.index_copy_(0, token_M, output_TD[token_M] + weighted_MD)
            start = end
            if arrival.buffer is not None:
                self._free.append((arrival.buffer, self._lane.mark()))
        if layer + 1 < self._cache.num_layers:
            self._copy_ahead(layer + 1, next_present_E)
        return output_TD

    def _step(
        self, layer: int, count_E: Tensor, max_needed: int, forecast_E: Tensor | None
    ) -> list[list[int]]:
        """One event; on the host: counts, slots, neurons present before, and in the next layer."""
        cache = self._cache
        full = self._layout.expert_intermediate_size
        present_E = self._neurons_present(layer)
        step = cache.step(count_E > 0, layer=layer, forecast_LE=forecast_E, max_needed=max_needed)
        slot_of_E = step.slot_of_LE
        assert slot_of_E is not None
        self.counters.add(step, layer)
        if self._present_LE is not None:
            held_E = (count_E > 0) & (slot_of_E >= 0)
            row_E = self._present_LE[layer].masked_fill_(step.evict_LE, 0)
            row_E.masked_fill_(held_E, self._capacity_L[layer])
        if layer + 1 < cache.num_layers:
            next_present_E = self._neurons_present(layer + 1)
        else:
            next_present_E = torch.full_like(present_E, full)
        rows = [count_E, slot_of_E, present_E, next_present_E]
        self.stats.events += 1
        # The one time that the host waits: what follows depends on what was routed.
        values: list[list[int]] = torch.stack([row.long() for row in rows]).tolist()
        return values

    def _neurons_present(self, layer: int) -> Tensor:
        """int64 [E]: how many leading neurons of each expert are in its slot now."""
        resident_E = self._cache.usage.resident_LE[layer]
        if self._present_LE is not None:
            return (self._present_LE[layer] * resident_E).long()
        return resident_E * self._capacity_L[layer]

    def _arrivals(
        self,
        layer: int,
        needed: Sequence[int],
        slot_E: Sequence[int],
        present_E: Sequence[int],
    ) -> Iterator[_Arrival]:
        """The records of ``needed``, in order; each copy is given to the lane as early as can be.

        A buffer is free again when the caller has come back for the next record.
        """
        early = self._take_early(layer, needed)
        started = self._lane.mark()  # whatever read the newcomers' slots before is done by then
        queue: deque[_Arrival] = deque()
        ahead = 0
        for index in range(len(needed)):
            while ahead < len(needed):
                expert = needed[ahead]
                slot_P = self._slots_LCP[layer][slot_E[expert]] if slot_E[expert] >= 0 else None
                if ahead == index and not self._free and early and expert not in early:
                    self._drop(early.pop(max(early)))  # all buffers hold what comes later
                arrival = self._bring(layer, expert, slot_P, present_E[expert], early, started)
                if arrival is None:
                    break
                queue.append(arrival)
                ahead += 1
            assert ahead > index, "no staging buffer came free"
            yield queue.popleft()

    def _bring(
        self,
        layer: int,
        expert: int,
        slot_P: Tensor | None,
        present: int,
        early: dict[int, _Arrival],
        started: Any,
    ) -> _Arrival | None:
        """Where a record will be whole, and when; None while no staging buffer is free for it."""
        capacity = self._capacity_L[layer]
        full = self._layout.expert_intermediate_size
        if slot_P is not None and present == full:
            return _Arrival(slot_P, None, None)
        if expert in early:
            arrival = early.pop(expert)
        elif slot_P is not None and capacity == full:
            return self._copy_to_slot(layer, expert, slot_P, present, started)
        elif self._free:
            arrival = self._copy_to_buffer(layer, expert, slot_P, present, started)
        else:
            return None
        if slot_P is not None and present < capacity:
            # On the device, by the stream that reads the buffer anyway before it is free again.
            self._lane.join(arrival.ready)
            slot_P.copy_(arrival.record_P[: len(slot_P)])
        return arrival

    def _take_early(self, layer: int, needed: Sequence[int]) -> dict[int, _Arrival]:
        """What was copied ahead for this layer and is needed; the other buffers are free again."""
        wanted = set(needed) if self._early_layer == layer else set()
        arrived, self._early = self._early, {}
        for expert, arrival in arrived.items():
            if expert not in wanted:
                self._drop(arrival)
        return {expert: arrival for expert, arrival in arrived.items() if expert in wanted}

    def _drop(self, arrival: _Arrival) -> None:
        """Free the buffer of what was copied ahead in vain."""
        assert arrival.buffer is not None
        # Only the lane wrote there, and only the lane will: its own order suffices.
        self._free.append((arrival.buffer, None))
        self.stats.wasted_bytes += self._layout.record_bytes

    def _copy_ahead(self, layer: int, present_E: Sequence[int]) -> None:
        """Fill the free buffers with the layer's first absent experts."""
        self._early_layer = layer
        for expert, present in enumerate(present_E):
            if not self._free:
                break
            if present == 0:
                self._early[expert] = self._copy_to_buffer(layer, expert, None, 0, None)
                self.stats.prefetched_bytes += self._layout.record_bytes

    def _copy_to_slot(
        self, layer: int, expert: int, slot_P: Tensor, present: int, after: Any
    ) -> _Arrival:
        """Bring what is missing of a record straight to its slot."""
        first = present * self._neuron_elements
        record_P = self._home.record_P(layer, expert)
        ready = self._lane.copy([(slot_P[first:], record_P[first:])], after)
        self.stats.link_bytes += (len(record_P) - first) * record_P.element_size()
        return _Arrival(slot_P, ready, None)

    def _copy_to_buffer(
        self, layer: int, expert: int, slot_P: Tensor | None, present: int, after: Any
    ) -> _Arrival:
        """Put a record together in a staging buffer: what the slot has, and the rest from home."""
        buffer, free = self._free.popleft()
        target_P, record_P = self._staging_SP[buffer], self._home.record_P(layer, expert)
        first = 0 if slot_P is None else present * self._neuron_elements
        pairs = [(target_P[first:], record_P[first:])]
        if slot_P is not None and first:
            pairs.append((target_P[:first], slot_P[:first]))
        ready = self._lane.copy(pairs, free, after)
        self.stats.link_bytes += (len(record_P) - first) * record_P.element_size()
        return _Arrival(target_P, ready, buffer)
