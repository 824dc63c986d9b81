"""Decoder layers that decode through `torch.compile`: fewer, larger kernels between the experts.

A step of one token is many small kernels (norms, rotary embeddings, masks, softmax, copies into the
KV cache), each far shorter than the gap to the next one. Inductor fuses them. Only what a step of
`runtime.decode_graph` runs is compiled; prompts and everything else go through the layers as they
are. Experts stay outside: their function is one that the compiler does not look into.

Layers of one kind share their programs: each is shown its own part of the KV cache only, so that
its number, by which it would find it, means nothing to the compiler.

Knows nothing of graphs, experts or caches.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

logger = logging.getLogger(__name__)

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])
_MOST_PROGRAMS = 256  # kinds of layers, batch sizes, kinds of KV cache; the compiler's own is 8


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
        self._compiled = [
            _with_own_kv(torch.compile(layer._call_impl, backend=backend), index)
            for index, layer in enumerate(self._layers)
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the layers are compiled for whatever they are called with, and then run so."""
        import torch._dynamo as dynamo  # takes a second to import: only who compiles pays for it

        before, started_s = _num_programs(dynamo), time.perf_counter()
        theirs = [layer._compiled_call_impl for layer in self._layers]  # of who calls `compile`
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            layer._compiled_call_impl = compiled
        try:
            with dynamo.config.patch(
                allow_unspec_int_on_nn_module=True,
                recompile_limit=_MOST_PROGRAMS,
                accumulated_recompile_limit=_MOST_PROGRAMS,
                fail_on_recompile_limit_hit=True,
            ):
                yield
        finally:
            for layer, compiled in zip(self._layers, theirs, strict=True):
                layer._compiled_call_impl = compiled
        if (made := _num_programs(dynamo) - before) > 0:
            logger.info("Compiled %d programs in %.1f s", made, time.perf_counter() - started_s)


class _OneLayerKV(Cache):  # type: ignore[misc]
    """A KV cache as one decoder layer sees it: its number does not matter."""

    def __init__(self, layer: Any) -> None:
        self.layers = [layer]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the whole cache's, for whatever ``layer_idx``."""
        states: tuple[Tensor, Tensor] = self.layers[0].update(
            key_states, value_states, *args, **kwargs
        )
        return states


def _with_own_kv(call: Callable[..., Any], index: int) -> Callable[..., Any]:
    def called(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        kv = None if past_key_values is None else _OneLayerKV(past_key_values.layers[index])
        return call(*args, past_key_values=kv, **kwargs)

    return called


def _num_programs(dynamo: Any) -> int:
    return int(dynamo.utils.counters["stats"]["unique_graphs"])
