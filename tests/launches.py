"""Counting what a GPU would be asked to do, on a machine without one."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operations that torch would launch on a GPU: views and allocations are none.

    A Triton kernel is not counted, but by the interpreter it runs as torch operations, which are.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_free = func.is_view or func.overloadpacket in (
            *(torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten._unsafe_view),
        )
        self.count += not is_free
        return func(*args, **(kwargs or {}))
