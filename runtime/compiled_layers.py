"""Decoder layers that decode through `torch.compile`: fewer, larger kernels between the experts.

A step of one token is many small kernels (norms, rotary embeddings, masks, softmax, copies into the
KV cache), each far shorter than the gap to the next one. Inductor fuses them. Only what a step of
`runtime.decode_graph` runs is compiled; prompts and everything else go through the layers as they
are. Experts stay outside: their function is one that the compiler does not look into.

Every layer is compiled for itself, as its number is part of how it finds its KV cache; equal
programs are found again in Inductor's own cache.

Knows nothing of graphs, experts or caches.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

logger = logging.getLogger(__name__)

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])
_VARIANTS_PER_LAYER = 8  # batch sizes and kinds of KV cache; the compiler's own limit is for all


def not_compiled(function: _FunctionT) -> _FunctionT:
    """The same function, which a compiler calls and does not look into."""
    outside: _FunctionT = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return outside


class CompiledLayers:
    """The decoder layers of a model, compiled within `in_use` and as they were elsewhere.

    Args:
        model: A transformers model whose decoder has ``layers``.
        backend: Of `torch.compile`.

    Raises:
        ValueError: The model's decoder has no such layers.
    """

    def __init__(self, model: Any, *, backend: str = "inductor") -> None:
        layers = getattr(model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise ValueError(
                f"{type(model).__name__}'s decoder has no list of layers: nothing to compile"
            )
        self._layers: list[Any] = list(layers)
        self._compiled: list[Callable[..., Any]] = [
            torch.compile(layer._call_impl, backend=backend, dynamic=False)
            for layer in self._layers
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the layers are compiled for whatever they are called with, and then run so."""
        import torch._dynamo as dynamo  # takes a second to import: only who compiles pays for it

        limit = len(self._layers) * _VARIANTS_PER_LAYER
        before, started_s = _num_programs(dynamo), time.perf_counter()
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            layer._compiled_call_impl = compiled
        try:
            with dynamo.config.patch(
                recompile_limit=limit,
                accumulated_recompile_limit=limit,
                fail_on_recompile_limit_hit=True,
            ):
                yield
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None
        if (made := _num_programs(dynamo) - before) > 0:
            logger.info("Compiled %d programs in %.1f s", made, time.perf_counter() - started_s)


def _num_programs(dynamo: Any) -> int:
    return int(dynamo.utils.counters["stats"]["unique_graphs"])
