"""A model's experts on a GPU: slots in its memory, everything else in page-locked host memory.

A few tokens (decode) are one cache step and one expert step a layer (`runtime.device_cache`,
`runtime.kernels`), neither of which waits for the host, so that `runtime.decode_graph` captures
them. Many tokens (prompts) stream what is missing through staging buffers (`runtime.prefill`). Both
work on the same slots and the same books.

Where host memory could not be page-locked, kernels cannot read it: then decode goes the way of
prompts, and is not captured.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · D hidden ·
C slots · P elements of a record · S staging buffers.
"""

import logging
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.adapters import MoELayer, expert_parameters
from data.schema import MoESpec
from runtime.backend import OffloadStats
from runtime.cache import Event
from runtime.expert_view import ExpertView
from runtime.gpu_lane import GpuLane, LaneMode
from runtime.gpu_memory import STAGING_BUFFERS
from runtime.gpu_stats import gpu_stats
from runtime.kernels.activation import activations_of
from runtime.kernels.experts import expert_step
from runtime.kernels.tiles import MAX_TOKENS, workspace_elements
from runtime.pass_hooks import watch_passes
from runtime.pinned_store import PinnedStore
from runtime.policies.base import Policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.sources import Now, Source
from runtime.prefill import PrefillStats
from runtime.slot_division import Divider, Division
from runtime.slot_split import SlotSplit

logger = logging.getLogger(__name__)


class GpuExperts:
    """`runtime.backend.Backend` for a CUDA device; on CPU tensors it runs interpreted, for tests.

    Args:
        layers: All MoE layers of the model.
        spec: The model's MoE.
        slots: C of each layer, of whole experts; or how they are split.
        policy: What to keep.
        store: The experts.
        staging_buffers: Of `runtime.prefill`; none where every expert has a slot.
        cpu_lane: Let the host compute a part of what a step misses (`runtime.gpu_lane`).
        prefetch_by: Who says what to prefetch; None prefetches nothing.
        prefetch: How.
        count_routing: Count what `runtime.redivide` reckons with.

    Attributes:
        divider: Cuts the slots.
        num_divisions: How often slots were cut anew.
        activations: Of each layer's experts.
        cache: The books, on the device.
        device: Where they are.
        max_graph_tokens: The most tokens of a step that can be captured; None if none can.
        later_use_LE: float32, what is expected; `later_use` gives it to write to.
        prefetcher: Where something is prefetched: there is somebody to say what, something is not
            resident, and the device can read it at home.
        speculative: It instead, where that goes ``beside`` the slots.
        fetches: Whichever of both there is.

    Raises:
        ValueError: The kernels cannot compute these experts, or slots cannot be so.
    """

    def __init__(
        self,
        *,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: Sequence[int] | SlotSplit,
        policy: Policy,
        store: PinnedStore,
        staging_buffers: int = STAGING_BUFFERS,
        cpu_lane: LaneMode = False,
        prefetch_by: Source | None = None,
        prefetch: PrefetchOptions | None = None,
        count_routing: bool = False,
    ) -> None:
        self._layers, self._spec, self._store = layers, spec, store
        self.activations = activations_of(layers)
        layout, device = store.layout, store.device
        split = slots if isinstance(slots, SlotSplit) else SlotSplit.whole(slots, layout)
        self.divider = Divider(
            split,
            layers=layers,
            spec=spec,
            store=store,
            staging_buffers=staging_buffers,
            prefetch_by=prefetch_by,
            prefetch=prefetch or PrefetchOptions(),
            count_routing=count_routing,
        )
        self.num_divisions = 0
        self._use(self.divider.divide(split, policy))
        elements = workspace_elements(num_tokens=MAX_TOKENS, top_k=spec.top_k, layout=layout)
        self._workspace = torch.empty(elements, device=device)
        self.device: torch.device | None = device
        self.max_graph_tokens: int | None = MAX_TOKENS if store.is_pinned else None
        staging_SP = self.divider.staging_SP
        self.lane = GpuLane.start(
            cpu_lane,
            store=store,
            activations=self.activations,
            top_k=spec.top_k,
            max_tokens=MAX_TOKENS,
            scratch=staging_SP if len(staging_SP) else self._division.slots_LCP[0],
        )
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None
        self._home = device
        self._last_stats: OffloadStats | None = None

    def _use(self, division: Division) -> None:
        self._division, self.cache = division, division.cache
        self.prefetcher, self.speculative = division.prefetcher, division.speculative
        self.fetches = division.prefetcher or division.speculative
        self._prefill, self.later_use_LE = division.prefill, division.later_use_LE
        self._has_begun = False

    def divide(self, split: SlotSplit) -> None:
        """Cut the slots anew, between two forward passes; graphs must be captured anew.

        They are filled with what the policy ranks highest. If that fails the old division stays,
        empty: its slots might have been written over.

        Raises:
            ValueError: The split does not fit the model, or the memory.
        """
        self.before_pass()  # what a broken pass still copies goes where it was meant to
        if self._store.device.type == "cuda":  # also what streams beside this one copy
            torch.cuda.synchronize(self._store.device)
        self._use(self.divider.replace(self._division, split))
        self.num_divisions += 1

    @classmethod
    def build(
        cls,
        *,
        model: nn.Module,
        layers: Sequence[MoELayer],
        spec: MoESpec,
        slots: Sequence[int] | SlotSplit,
        policy: Policy,
        device: torch.device,
        cpu_lane: LaneMode = False,
        prefetch_by: Source | None = None,
        prefetch: PrefetchOptions | None = None,
        count_routing: bool = False,
    ) -> Self:
        """Take the experts out of ``model`` and move the rest of it to ``device``.

        What fails half-way is undone. Where something is prefetched, or the host helps, hooks of
        the model tell when a pass begins and ends.

        Raises:
            ValueError: The kernels cannot compute these experts; nothing has changed.
        """
        activations_of(layers)
        home = next(expert_parameters(layers[0].experts))[1].device
        store = PinnedStore.take(layers, device)
        try:
            model.to(device)
            backend = cls(
                layers=layers,
                spec=spec,
                slots=slots,
                policy=policy,
                store=store,
                cpu_lane=cpu_lane,
                prefetch_by=prefetch_by,
                prefetch=prefetch,
                count_routing=count_routing,
            )
        except BaseException:
            for moe in layers:
                store.give_back(moe, home)
            model.to(home)
            store.close()
            raise
        backend._model, backend._home = model, home
        fetches = backend.fetches is not None
        if backend.lane is not None or fetches:
            backend._hooks = watch_passes(model, backend, from_embedding=fetches)
        return backend

    @property
    def split(self) -> SlotSplit:
        """How slots are cut now."""
        return self._division.split

    @property
    def prefill_stats(self) -> PrefillStats:
        """What prompts have moved; it counts on."""
        return self._prefill.stats

    @property
    def events(self) -> list[Event]:
        """None are kept: reading them would make every step wait."""
        return []

    def expect(self, later_LE: Tensor, layer: int | None = None) -> None:
        """As `Backend.expect`; of one layer between its router and its experts."""
        place = self.later_use(layer)
        if later_LE.data_ptr() != place.data_ptr():
            place.copy_(later_LE)
        if layer is not None:
            self.cache.rescore(layer, place)

    def later_use(self, layer: int | None = None) -> Tensor:
        """As `Backend.later_use`; where scores are forecasts it spares the cache its scoring, too.

        A prefetch that is being decided on reads there: what follows on the stream waits for it.
        """
        if self.fetches is not None:
            self.fetches.join_decision()
        return self.later_use_LE if layer is None else self.later_use_LE[layer]

    def before_pass(self) -> None:
        """A forward pass is at hand; the one before might have been broken off."""
        self._has_begun = False
        if self.fetches is not None:
            self.fetches.drop_broken()
        if self.lane is not None:
            self.lane.begin_pass()

    def begin_pass(self, num_tokens: int) -> None:
        """A forward pass begins, and what is expected of it is known: fetch for its first layers.

        Optional: without it, prefetching begins behind layer 0. To be called inside a captured
        step.
        """
        if self.fetches is not None and self._is_decode(num_tokens):
            if not self._is_capturing():
                self.fetches.drop_broken()  # a capture that failed has no other end
            self._advance()
            self._has_begun = True
            now = Now(-1, num_tokens)
            if self.prefetcher is not None:
                self.prefetcher.fetch_beside(now, None)
            self.fetches.fetch_after(now)

    def after_pass(self) -> None:
        """A forward pass has been given to the device; to be called outside a captured step."""
        if self.prefetcher is not None:
            self.prefetcher.review.after_pass()

    def forward(
        self, layer: int, hidden_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> Tensor:
        """As `Backend.forward`; without a wait for the host where T is at most `MAX_TOKENS`."""
        num_tokens, prefetcher = len(hidden_TD), self.prefetcher
        if layer == 0 and self.lane is not None:  # who calls no model has had no hook to do it
            self.lane.begin_pass()
        if self.fetches is not None:
            self.fetches.join_decision()
        if not self._is_decode(num_tokens):
            if prefetcher is not None:
                prefetcher.join_copies(layer, None)
            output_TD = self._prefill.forward(
                layer,
                hidden_TD,
                topk_expert_ids_TK,
                topk_weights_TK,
                self.later_use_LE[layer] if self._reads_forecasts else None,
            )
            self.cache.readdress(layer)
            return output_TD
        if layer == 0 and not self._has_begun:
            self._advance()
        self._has_begun = False
        try:
            return self._decode(layer, hidden_TD, topk_expert_ids_TK, topk_weights_TK)
        except BaseException:
            # The books tell of experts that were never put into their slots. (Within a capture they
            # tell nothing: nothing has been computed.)
            if not self._is_capturing():
                self.reset()
            raise

    def _decode(
        self, layer: int, hidden_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> Tensor:
        num_tokens, prefetcher = len(hidden_TD), self.prefetcher
        ids_TK = topk_expert_ids_TK.long().contiguous()
        active = self.cache.step(layer, ids_TK)
        landed = None if self.speculative is None else self.speculative.join(layer)
        output_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device)
        hidden_TD = hidden_TD.contiguous()
        now = Now(layer, num_tokens, hidden_TD, ids_TK)
        if prefetcher is not None:
            prefetcher.join_copies(layer, active)
            prefetcher.fetch_beside(now, active)
        lane = None
        if self.lane is not None:
            lane = self.lane.post(layer, hidden_TD, ids_TK, active, self.cache)
        slot_neurons = self.cache.memory[layer].slot_neurons
        expert_step(
            hidden_TD=hidden_TD,
            topk_expert_ids_TK=ids_TK,
            topk_weights_TK=topk_weights_TK.contiguous(),
            active=active,
            home_address_E=self.cache.home_address_LE[layer],
            address_E=self.cache.address_LE[layer],
            slot_neurons=slot_neurons,
            layout=self._store.layout,
            activation=self.activations[layer],
            workspace=self._workspace,
            output_TD=output_TD,
            lane=lane,
            landed=landed,
        )
        if self.lane is not None:
            self.lane.complete(layer, slot_neurons, ids_TK.numel())
        counts = self.divider.counts
        if counts is not None and num_tokens == 1 and layer == self._spec.num_layers - 1:
            counts.add(self.cache.keep_LE, self.cache.needed_LE)
        if self.fetches is not None:
            self.fetches.fetch_after(now)
        return output_TD

    def _is_capturing(self) -> bool:
        is_cuda = self._store.device.type == "cuda"
        return is_cuda and torch.cuda.is_current_stream_capturing()

    def use_policy(self, policy: Policy) -> Policy:
        """As `Backend.use_policy`; graphs that were captured before keep by the old one."""
        before = self.cache.policy
        self.cache.policy = self.cache.cache.policy = policy
        return before

    def reset(self) -> None:
        """As `Backend.reset`."""
        if self.fetches is not None:
            self.fetches.join_decision()
        self.cache.reset()
        self._prefill.forget()
        if self.prefetcher is not None:  # which judges by differences of what is counted
            self.prefetcher.review.reset()

    @property
    def _reads_forecasts(self) -> bool:
        return self.cache.policy.foresight != "none"

    def _is_decode(self, num_tokens: int) -> bool:
        """Whether a pass of so many tokens is for the kernels."""
        return 0 < num_tokens <= MAX_TOKENS and self._store.is_pinned

    def _advance(self) -> None:
        self.cache.advance(self.later_use_LE if self._reads_forecasts else None)

    def stats(self) -> OffloadStats:
        """As `Backend.stats`; waits for the device."""
        if self._last_stats is not None:
            return self._last_stats
        return gpu_stats(
            cache=self.cache,
            prefill=self._prefill,
            store=self._store,
            lane=self.lane,
            prefetcher=self.prefetcher,
            slot_bytes=self.split.num_bytes(self._store.layout),
            num_divisions=self.num_divisions,
        )

    def view(self, *, goes_on: bool = True) -> ExpertView:
        """As `Backend.view`; kernels count by layer, so nothing is known of each expert's use."""
        return ExpertView(
            resident_LE=self.cache.cache.usage.resident_LE.cpu().clone(),
            expected_LE=self.later_use_LE.cpu().clone() if self._reads_forecasts else None,
        )

    def restore(self) -> None:
        """As `Backend.restore`; the model goes back to the device where it was."""
        try:
            self._last_stats = self.stats()
        except RuntimeError as error:  # a device that has failed counts no more
            logger.warning("The counters are lost with the device: %s", error)
            self._last_stats = OffloadStats(
                hits=0, misses=0, streamed=0, evictions=0, miss_bytes=0, stall_s=0.0
            )
        if self.lane is not None:
            self.lane.close()
        for hook in self._hooks:
            hook.remove()
        if self._store.device.type == "cuda":
            try:  # what a broken pass still copies reads memory that is about to go
                torch.cuda.synchronize(self._store.device)
            except RuntimeError as error:
                logger.warning("What was under way has ended with the device: %s", error)
        del self._prefill, self.cache, self._workspace, self._division, self.divider
        del self.prefetcher, self.speculative, self.fetches
        try:
            for moe in self._layers:
                self._store.give_back(moe, self._home)
            if self._model is not None:
                self._model.to(self._home)
        except RuntimeError as error:
            raise RuntimeError(
                f"the device has failed ({error}): what of the model lay on it is lost, load it "
                "again"
            ) from error
        self._store.close()
