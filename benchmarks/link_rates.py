"""How fast records cross the link here and now: by the copy engine, and by threads of the GPU.

The rates against which a decode step is judged are measured in the same process, on the same
buffers. Knows nothing of models.

Shape letters: E records · P elements of a record.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.record import spread
from runtime.kernels.copy import copy_records
from runtime.link import timings_s

REPEATS = 5
MAX_BYTES = 2**30  # of one measurement


def link_rates(host_EP: Tensor, device_EP: Tensor) -> dict[str, dict[str, Any]]:
    """Bytes per second from ``host_EP`` into ``device_EP``, a spread for each way.

    Args:
        host_EP: Records in pinned memory.
        device_EP: As many records' memory; its content is overwritten.
    """
    record_bytes = host_EP[0].numel() * host_EP.element_size()
    num_records = max(1, min(len(host_EP), MAX_BYTES // record_bytes))
    source_EP, target_EP = host_EP[:num_records], device_EP[:num_records]
    addresses = {
        name: torch.tensor([record_P.data_ptr() for record_P in records_EP]).to(device_EP.device)
        for name, records_EP in (("source", source_EP), ("target", target_EP))
    }
    num_bytes_N = torch.full((num_records,), record_bytes, device=device_EP.device)

    def engine() -> None:
        target_EP.copy_(source_EP, non_blocking=True)

    def threads() -> None:
        copy_records(addresses["source"], addresses["target"], num_bytes_N)

    return {
        name: spread(
            [
                num_records * record_bytes / spent_s
                for spent_s in timings_s(copy, device_EP.device, repeats=REPEATS)
            ]
        )
        for name, copy in (("copy engine", engine), ("GPU threads", threads))
    }
