"""One division of a GPU's slots, and everything that knows where they are.

Books, prefetchers and prompts go by the addresses of slots. So another division is another
`Division`; it takes over what the one before has counted and what each expert has been used, and
fills its slots with the experts that the policy ranks highest.

Knows nothing of forward passes, nor of when memory is divided anew.

Shape letters: L MoE layers · E experts per layer · C slots · P elements · S staging buffers ·
M experts that are copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.adapters import MoELayer
from data.schema import MoESpec
from runtime.device_cache import DeviceCache
from runtime.kernels.copy import copy_records
from runtime.kernels.tiles import MAX_TOKENS
from runtime.pinned_store import PinnedStore
from runtime.policies.base import Policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.prefetcher import Prefetcher
from runtime.prefetch.sources import Source
from runtime.prefetch.speculative import SpeculativePrefetcher
from runtime.prefill import PrefillExecutor
from runtime.slot_pool import SlotPool
from runtime.slot_split import SlotSplit
from runtime.split_counts import SplitCounts


class Divider:
    """Makes divisions of one piece of memory; what they need beside it, they share.

    Args:
        split: The first division, which says how much memory there is.
        layers: The model's MoE layers.
        spec: The model's MoE.
        store: The experts at home.
        staging_buffers: S, for prompts; none where every expert has a slot.
        prefetch_by: Who says what to prefetch; None prefetches nothing.
        prefetch: How.
        count_routing: Count what the next division reckons with.

    Attributes:
        pool: The slots' memory.
        staging_SP: The staging buffers.
        counts: What is counted, if anything.

    Raises:
        ValueError: The split does not fit the model.
    """

    def __init__(
        self,
        split: SlotSplit,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        store: PinnedStore,
        staging_buffers: int,
        prefetch_by: Source | None,
        prefetch: PrefetchOptions,
        count_routing: bool,
    ) -> None:
        layout, device = store.layout, store.device
        split.check(spec, layout)

        def records(count: int) -> Tensor:
            return torch.empty(count, layout.record_elements, dtype=layout.dtype, device=device)

        holds_all = split.holds_all(spec, layout)
        self.layers, self.spec, self.store, self.prefetch = layers, spec, store, prefetch
        self.pool = SlotPool(split, layout, device)
        self.staging_SP = records(0 if holds_all else staging_buffers)
        self.prefetch_by = prefetch_by if store.is_pinned and not holds_all else None
        goes_beside = self.prefetch_by is not None and prefetch.into == "beside"
        pieces = min(prefetch.landing_records, spec.num_experts)
        self.beside_NP = records(pieces if goes_beside else 0)
        self.counts: SplitCounts | None = None
        if count_routing:
            self.counts = SplitCounts(
                num_layers=spec.num_layers,
                num_experts=spec.num_experts,
                top_k=spec.top_k,
                device=device,
                with_guesses=goes_beside,
            )

    def divide(self, split: SlotSplit, policy: Policy) -> "Division":
        """Cut the memory so; whoever uses another division must not go on.

        Raises:
            ValueError: The split does not fit the model, or the memory.
        """
        split.check(self.spec, self.store.layout)
        return Division(split, policy, self)

    def replace(self, before: "Division", split: SlotSplit) -> "Division":
        """Cut the memory anew; if that fails, ``before`` is empty and may be used again.

        Raises:
            ValueError: As `divide`.
        """
        try:
            with torch.inference_mode(mode=False):  # whose tensors could be changed nowhere else
                division = self.divide(split, before.cache.policy)
                division.take_over(before)
        except BaseException:
            before.empty()  # its slots might have been written over
            raise
        return division


class Division:
    """Slots that are cut in one way; `Divider.divide` makes it.

    Args:
        split: How.
        policy: What to keep.
        parts: What divisions share.

    Attributes:
        slots_LCP: Of each layer.
        cache: The books.
        prefetcher: Where something is prefetched.
        speculative: It instead, where that goes beside the slots.
        prefill: Serves prompts.
        later_use_LE: float32, what is expected.
    """

    def __init__(self, split: SlotSplit, policy: Policy, parts: Divider) -> None:
        store, spec, layout = parts.store, parts.spec, parts.store.layout
        self.split, self.slots_LCP, self._store = split, parts.pool.cut(split), store
        source, options, counts = parts.prefetch_by, parts.prefetch, parts.counts
        self.cache = DeviceCache(
            policy,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            num_neurons=layout.expert_intermediate_size,
            memory=parts.pool.memory(split),
            home_address_LE=store.address_LE,
            max_tokens=MAX_TOKENS,
            device=store.device,
            with_prefetch=source is not None and options.into == "slots",
        )
        self.prefetcher: Prefetcher | None = None
        self.speculative: SpeculativePrefetcher | None = None
        if source is not None and options.into == "beside":
            self.speculative = SpeculativePrefetcher(
                self.cache,
                store=store,
                source=source,
                options=options,
                buffer_NP=parts.beside_NP,
                said_LE=None if counts is None else counts.said_LE,
            )
        elif source is not None:
            self.prefetcher = Prefetcher(self.cache, store=store, source=source, options=options)
        self.prefill = PrefillExecutor(
            home=store,
            layout=layout,
            experts=[moe.experts for moe in parts.layers],
            slots_LCP=self.slots_LCP,
            cache=self.cache.cache,
            staging_SP=parts.staging_SP,
            present_LE=self.cache.present_LE,
        )
        self.later_use_LE = (
            self.cache.keep_LE
            if policy.scores_are_forecasts
            else torch.zeros(spec.num_layers, spec.num_experts, device=store.device)
        )

    def take_over(self, before: "Division") -> None:
        """Go on from another division, which must serve no more: counts, uses, the best experts."""
        ours, theirs = self.cache.cache.usage, before.cache.cache.usage
        self.cache.counters_LX.copy_(before.cache.counters_LX)
        self.prefill.counters, self.prefill.stats = before.prefill.counters, before.prefill.stats
        self.later_use_LE.copy_(before.later_use_LE)
        for name in ("step_L1", "last_use_LE", "use_count_LE", "visits_LE"):
            getattr(ours, name).copy_(getattr(theirs, name))
        for half_life, uses_LE in ours.decayed_uses.items():
            uses_LE.copy_(theirs.decayed_uses[half_life])
        ours.inserted_LE.copy_(ours.step_L1.expand_as(ours.inserted_LE))
        policy = self.cache.policy
        forecast_LE = before.later_use_LE if policy.foresight != "none" else None
        self._fill(policy.keep_scores(theirs, forecast_LE).expand_as(ours.inserted_LE))
        ours.visits_LE.mul_(ours.resident_LE)

    def empty(self) -> None:
        """Hold nothing, and go on counting."""
        books = self.cache.cache
        assert books.slot_of_LE is not None
        books.slot_of_LE.fill_(-1)
        for tensor in (books.usage.resident_LE, books.used_L1, self.cache.present_LE):
            tensor.zero_()
        if books.prefetched_LE is not None:
            books.prefetched_LE.zero_()
        self.cache.address_LE.copy_(self.cache.home_address_LE)

    def _fill(self, keep_LE: Tensor) -> None:
        """Bring the highest scores into the slots, of equals the first; no misses."""
        self.empty()
        if not self._store.is_pinned:
            return  # threads of the device cannot read them: what is needed comes by itself
        books = self.cache.cache
        assert books.slot_of_LE is not None
        order_LE = keep_LE.argsort(dim=-1, descending=True, stable=True)
        for layer, (count, neurons) in enumerate(
            zip(self.split.slots, self.split.neurons, strict=True)
        ):
            best_C = order_LE[layer, :count]
            books.slot_of_LE[layer, best_C] = torch.arange(count, device=best_C.device)
            books.usage.resident_LE[layer, best_C] = True
            books.used_L1[layer] = count
            self.cache.present_LE[layer, best_C] = neurons
            self.cache.readdress(layer)
        resident_LE = books.usage.resident_LE
        slot_bytes_L = torch.tensor(
            [slots.slot_bytes for slots in self.cache.memory], device=keep_LE.device
        )
        copy_records(
            self.cache.home_address_LE[resident_LE],
            self.cache.address_LE[resident_LE],
            slot_bytes_L[:, None].expand_as(keep_LE)[resident_LE].contiguous(),
        )
