"""A CPU stand-in for CUDA graphs: what is replayed is operations on fixed tensors, not Python.

Like a captured graph, a recording knows no Python integer that changes, runs no hook and reads no
input but its static ones; and like a capture, recording refuses what would make the host wait.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache

from runtime.decode_graph import without_cache

_ATEN = torch.ops.aten
# Reading a value, sizes that depend on values, constants that are copied from the host.
WAITS = frozenset(
    {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.lift_fresh, _ATEN.masked_select, _ATEN.equal}
)


class _Tape(TorchDispatchMode):
    """Every operation that was run, with the very tensors that it was run on."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func} is not permitted while a stream is capturing")
        output = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, output))
        return output

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, recorded in self._operations:
            now = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(recorded), now, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A `runtime.decode_graph.Recorder` that replays operations.

    Args:
        state: Gives what a step changes beside its KV cache.
    """

    def __init__(self, state: Callable[[], Iterable[Tensor]] = lambda: ()) -> None:
        self._state = state

    def record(self, step: Callable[[Cache], Any], cache: Cache) -> Callable[[Cache], Any]:
        names = ("keys", "values", "cumulative_length")
        state = [getattr(layer, name) for layer in cache.layers for name in names]
        state += self._state()
        before = [tensor.clone() for tensor in state]
        tape = _Tape()
        try:
            with tape:
                output = without_cache(step(cache))
        finally:  # a capture computes nothing
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        def replay(cache: Cache) -> Any:
            tape.play()
            return output

        return replay
