"""The GPU's slow tier: all routed experts of a model in page-locked host memory.

A GPU reads page-locked memory in place, over the link, and copies out of it at full rate; out of
other memory it can only copy, seven times slower. Where the system refuses to lock pages, the
records stay pageable: `PinnedStore.is_pinned` says so, and whoever computes must copy first.

Experts are taken out of the model layer by layer, so that beside them host memory holds one layer.

Knows nothing of slots, policies or kernels.

Shape letters: L MoE layers · E experts per layer · P elements of a record (`expert_layout`).
"""

import contextlib
import logging
import mmap
import weakref
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from data.adapters import MoELayer, expert_parameters
from runtime.expert_layout import ExpertLayout, expert_tensors
from runtime.host_store import release_experts

logger = logging.getLogger(__name__)


class PinnedStore:
    """Records of every expert, by layer.

    Args:
        layout: Of the records.
        num_layers: L.
        num_experts: E.
        device: Whose access the memory is for; on a CPU nothing needs to be locked.

    Attributes:
        records_LEP: A tensor [E, P] for each layer.
        is_pinned: Whether ``device`` can read them in place.
    """

    def __init__(
        self, *, layout: ExpertLayout, num_layers: int, num_experts: int, device: torch.device
    ) -> None:
        self.layout, self.num_layers, self.num_experts = layout, num_layers, num_experts
        self.device = device
        self.records_LEP: list[Tensor] = []
        self.is_pinned = True
        self._locked: list[int] = []
        # Pages that are still locked when they are unmapped cannot be locked again: the finalizer
        # holds the memory until it has unlocked it, closed or not.
        self._unlock = weakref.finalize(self, _unlock, self._locked, self.records_LEP, device)

    @classmethod
    def take(cls, layers: Sequence[MoELayer], device: torch.device) -> Self:
        """Move the experts of ``layers`` here; their parameters show NaN on ``device`` afterwards.

        If it fails half-way, what was taken is given back.
        """
        store = cls(
            layout=ExpertLayout.of(layers[0].experts),
            num_layers=len(layers),
            num_experts=layers[0].num_experts,
            device=device,
        )
        homes = [next(expert_parameters(moe.experts))[1].device for moe in layers]
        total = len(layers) * store.num_experts
        try:
            with tqdm(total=total, desc="Move experts", unit="expert", disable=None) as progress:
                for moe in layers:
                    records_EP = store.add_layer()
                    tensors = expert_tensors(moe.experts)
                    for expert in range(store.num_experts):
                        store.layout.pack(tensors, expert, records_EP[expert])
                        progress.update()
                    del tensors
                    release_experts(moe, device)
        except BaseException:
            for moe, home in list(zip(layers, homes, strict=True))[: len(store.records_LEP)]:
                if next(expert_parameters(moe.experts))[1].stride()[0] == 0:  # it was released
                    store.give_back(moe, home)
            store.close()
            raise
        return store

    def add_layer(self) -> Tensor:
        """Memory for one more layer: zeros [E, P], page-locked if the system allows it."""
        records_EP, pages_bytes = self._whole_pages()
        if self.device.type == "cuda" and self.is_pinned:
            error = _cudart().cudaHostRegister(records_EP.data_ptr(), pages_bytes, 0)
            if int(error):
                self.is_pinned = False
                _forget_error(self.device)
                logger.warning(
                    "%d bytes of host memory could not be page-locked (%s) after %d layers: "
                    "experts are copied before they are used, at a fraction of the link's rate; "
                    "raise the limit of locked memory (ulimit -l)",
                    records_EP.nbytes,
                    error,
                    len(self._locked),
                )
            else:
                self._locked.append(records_EP.data_ptr())
        self.records_LEP.append(records_EP)
        return records_EP

    def _whole_pages(self) -> tuple[Tensor, int]:
        """Zeros [E, P] that begin a page, and the bytes up to the end of their last page.

        Pages are locked as a whole, and none may be locked twice: small layers must not share one.
        Large ones where there are any: cores that read experts (`runtime.cpu_lane`) then
        look up an address less often.
        """
        layout = self.layout
        num_bytes = self.num_experts * layout.record_bytes
        pages_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, pages_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        records = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes).view(layout.dtype)
        return records.view(self.num_experts, layout.record_elements), pages_bytes

    @property
    def address_LE(self) -> Tensor:
        """int64 on the host: where each record begins."""
        addresses = [[record_P.data_ptr() for record_P in layer] for layer in self.records_LEP]
        return torch.tensor(addresses, dtype=torch.int64)

    def record_P(self, layer: int, expert: int) -> Tensor:
        """One expert's record; never write to it."""
        return self.records_LEP[layer][expert]

    def give_back(self, moe: MoELayer, device: torch.device) -> None:
        """Fill a layer's expert parameters again, on ``device``, bit for bit as they were."""
        for _, parameter in expert_parameters(moe.experts):
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        tensors = expert_tensors(moe.experts)
        for expert in range(self.num_experts):
            self.layout.unpack(self.record_P(moe.layer, expert), tensors, expert)

    def close(self) -> None:
        """Unlock and free the memory."""
        self._unlock()


def _unlock(locked: list[int], records_LEP: list[Tensor], device: torch.device) -> None:
    errors = [error for a in locked if int(error := _cudart().cudaHostUnregister(a))]
    if errors:
        _forget_error(device)
        logger.warning(
            "%d of %d layers could not be unlocked (%s): memory at their addresses cannot be "
            "page-locked again by this process",
            len(errors),
            len(locked),
            errors[0],
        )
    locked.clear()
    records_LEP.clear()


def _forget_error(device: torch.device) -> None:
    """CUDA tells the next call of what has failed before; here that has been dealt with."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
