"""The CPU lane beside a GPU's expert kernels: whether there is one, its rates, and what follows.

`GpuLane.start` decides, from what it measures, whether the host is worth asking. Then each event
posts a request, and the expert kernel waits for its answer at the end. What the host has computed
is not in the slots yet: copies on a stream of their own complete them while later layers compute,
so that the link works when nobody waits for it. They are joined at the end of the forward pass,
before their layer's next event; after a pass that was broken off, where the next one begins.

Shape letters: L MoE layers · T tokens · K experts per token · D hidden.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.cpu_lane import CpuLane, LaneUnavailableError
from runtime.device_cache import Active, DeviceCache
from runtime.kernels.activation import Activation
from runtime.kernels.copy import copy_records
from runtime.kernels.lane import LaneEvent, LaneRates, fill_slots, post_request
from runtime.lane_mailbox import LaneBooks
from runtime.link import seconds_of
from runtime.pinned_store import PinnedStore

logger = logging.getLogger(__name__)

LaneMode = bool | Literal["auto"]
SLOWEST = 8.0  # a host of less than that part of the link's rate is not worth asking
MOST_FILLING = 0.7  # of an expert: what the link carries in about the time of a layer
_UNFILLED_LAYERS = 2  # at the end of a pass nothing is left that copies could hide behind
_UNMEASURED_LINK_BYTES_PER_S = 50e9  # of a device that has no link: the CPU, in tests


class GpuLane:
    """A lane that serves the events of one cache.

    Args:
        lane: The threads.
        store: The experts.
        rates: What decides the shares.
    """

    def __init__(self, lane: CpuLane, store: PinnedStore, rates: LaneRates) -> None:
        self._lane, self._store, self.rates = lane, store, rates
        lane.books.cpu_ns_1.fill_(rates.cpu_ns)
        self._is_filling = False  # copies were begun that nobody has joined
        self._stream: Any = None
        if store.device.type == "cuda":
            self._stream = torch.cuda.Stream(store.device)  # type: ignore[no-untyped-call]

    @classmethod
    def start(
        cls,
        mode: LaneMode,
        *,
        store: PinnedStore,
        activations: Sequence[Activation],
        top_k: int,
        max_tokens: int,
        scratch: Tensor,
    ) -> "GpuLane | None":
        """The lane, or None where it is not wanted or would not win.

        Args:
            mode: False is none; "auto" takes it where it wins; True wherever it works.
            store: The experts; pinned.
            activations: Of each layer.
            top_k: K.
            max_tokens: Of an event.
            scratch: A record's bytes on the device that may be overwritten.

        Raises:
            ValueError: ``mode`` is True and there can be no lane; or it is none of the three.
        """
        if mode not in (False, True, "auto"):
            raise ValueError(f"cpu_lane={mode!r}: must be False, True or 'auto'")
        if mode is False:
            return None
        lane: CpuLane | None = None
        try:
            if not store.is_pinned:
                raise LaneUnavailableError("the experts' memory could not be page-locked")
            lane = CpuLane(
                layout=store.layout,
                home_address_LE=store.address_LE,
                activations=activations,
                top_k=top_k,
                max_tokens=max_tokens,
                device=store.device,
            )
            cpu_s = lane.measure_neuron_s()
        except LaneUnavailableError as error:
            if lane is not None:  # threads that do not answer
                lane.close()
            if mode is True:
                raise ValueError(f"cpu_lane=True: there can be no CPU lane: {error}") from error
            logger.warning("No CPU lane: %s", error)
            return None
        num_neurons = store.layout.expert_intermediate_size
        neuron_bytes = store.layout.record_bytes / num_neurons
        link_s = link_record_s(store, scratch) / num_neurons
        what = (
            f"{neuron_bytes / cpu_s / 1e9:.1f} GB/s of weights on {lane.num_threads} threads, "
            f"the link {neuron_bytes / link_s / 1e9:.1f}"
        )
        if mode == "auto" and cpu_s > SLOWEST * link_s:
            logger.warning("No CPU lane: it would not win (%s)", what)
            lane.close()
            return None
        logger.info("CPU lane: %s", what)
        rates = LaneRates(
            link_ns=1e9 * link_s,
            cpu_ns=1e9 * cpu_s,
            slowest=SLOWEST,
            most_filling=round(MOST_FILLING * num_neurons),
        )
        return cls(lane, store, rates)

    @property
    def books(self) -> LaneBooks:
        """What kernels count and know."""
        return self._lane.books

    @property
    def bytes_per_s(self) -> float:
        """The host's rate as it was measured at the start."""
        layout = self._store.layout
        return 1e9 * layout.record_bytes / layout.expert_intermediate_size / self.rates.cpu_ns

    def post(
        self,
        layer: int,
        hidden_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        active: Active,
        cache: DeviceCache,
    ) -> LaneEvent:
        """Ask for the host's part of an event; `expert_step` gets what comes back."""
        event = LaneEvent(layer, self._lane.books, self._lane.mailbox, self.rates)
        slot_neurons = cache.memory[layer].slot_neurons
        post_request(
            event,
            hidden_TD=hidden_TD,
            topk_expert_ids_TK=topk_expert_ids_TK,
            active=active,
            home_address_E=cache.home_address_LE[layer],
            present_E=cache.present_LE[layer],
            slot_neurons=slot_neurons,
            layout=self._store.layout,
            fill=self._fills(layer, slot_neurons),
        )
        return event

    def begin_pass(self) -> None:
        """A forward pass begins: what one that was broken off still copies has to be there first.

        The next event might give those slots to others. Costs nothing after a pass that was
        completed. Never to be called within a capture, nor needed there: what is captured joins its
        own copies, and is replayed as a whole.
        """
        if self._is_filling:
            self._join()

    def complete(self, layer: int, slot_neurons: int, num_uses: int) -> None:
        """After an event's experts: begin to fill its slots; the last layer waits for all.

        Args:
            layer: Of the event.
            slot_neurons: How many neurons its slots hold.
            num_uses: T * K.
        """
        books = self._lane.books
        if self._fills(layer, slot_neurons):
            self._is_filling = True
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # None changes nothing
                event = LaneEvent(layer, books, self._lane.mailbox, self.rates)
                fill_slots(event, num_uses=num_uses)
        if layer == self._store.num_layers - 1 and self.rates.most_filling:
            self._join()

    def _join(self) -> None:
        """What follows on the current stream finds all copies done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        books = self._lane.books
        books.fill_done_1.copy_(books.fill_begun_1)  # also of what was never begun
        self._is_filling = False

    def _fills(self, layer: int, slot_neurons: int) -> bool:
        """Slots of tops only stay as they are."""
        is_whole = slot_neurons == self._store.layout.expert_intermediate_size
        is_early = layer < self._store.num_layers - _UNFILLED_LAYERS
        return is_whole and is_early and self.rates.most_filling > 0

    def stats(self) -> tuple[int, bool]:
        """Bytes of weights that the host has computed with, and whether it is asked now."""
        layout = self._store.layout
        neurons = self._lane.counts()["neurons"]
        num_bytes = neurons * layout.num_rows * layout.hidden_size * layout.dtype.itemsize
        return num_bytes, self._lane.is_on

    def close(self) -> None:
        """Stop the threads."""
        self._lane.close()


def link_record_s(store: PinnedStore, scratch: Tensor) -> float:
    """Seconds of a record over the link by threads of the GPU."""
    record_bytes = store.layout.record_bytes
    if store.device.type != "cuda":
        return record_bytes / _UNMEASURED_LINK_BYTES_PER_S

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=store.device)

    source_N = table([store.records_LEP[0].data_ptr()])
    target_N, num_bytes_N = table([scratch.data_ptr()]), table([record_bytes])
    return seconds_of(lambda: copy_records(source_N, target_N, num_bytes_N), store.device)
