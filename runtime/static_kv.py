"""The KV cache of captured decoding: one that keeps its addresses, step after step.

A CUDA graph replays addresses, and none of the host's own steps. transformers' static cache has
fixed addresses, but two habits that a graph cannot follow: sliding layers count positions in a
Python integer too, and once full they build an index tensor on the host. `capturable` replaces such
layers by ones that compute the same from device operations alone, and `one_position` keeps the
integers right around a replay.

`KVPool` also gives ``model.generate`` the memory of the last generation again, since a new address
would mean a new capture for every request.

Shape letters: B requests.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer


class SlidingLayer(StaticSlidingWindowLayer):  # type: ignore[misc]
    """A static sliding layer whose single-token update never waits for the host."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the base class, whose full layer would copy an index from the host at every step."""
        is_full = self.cumulative_length_int >= self.max_cache_len
        if not is_full or key_states.shape[-2] != 1:
            states: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return states
        self.cumulative_length_int += 1
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept.copy_(torch.cat((kept[:, :, 1:], new), dim=-2))
        return self.keys, self.values


def capturable(cache: StaticCache) -> StaticCache:
    """The same cache (not filled yet), its sliding layers replaced by `SlidingLayer`."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            # A window that is no longer than the cache is the layer's own length.
            cache.layers[index] = SlidingLayer(
                max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len
            )
    return cache


def why_not_capturable(cache: Any) -> str | None:
    """What keeps steps over ``cache`` from being captured; None if nothing does."""
    if not isinstance(cache, Cache) or not cache.layers:
        return "no static KV cache"
    for layer in cache.layers:
        if type(layer) not in (StaticLayer, SlidingLayer):
            return f"KV cache of {type(layer).__name__}"
        if not layer.is_initialized:
            return "KV cache is empty"
    return None


def addresses(cache: Cache) -> tuple[tuple[int, ...], ...]:
    """Where a cache lies, and which way of updating each layer is in: equal means one graph."""
    return tuple(
        (
            layer.keys.data_ptr(),
            layer.values.data_ptr(),
            layer.cumulative_length.data_ptr(),
            *layer.keys.shape,
            getattr(layer, "cumulative_length_int", -1) >= layer.max_cache_len,
        )
        for layer in cache.layers
    )


@contextmanager
def one_position(cache: Cache, *, tokens: int) -> Iterator[None]:
    """Within, the host's integers say no more than whether a window is full.

    What is captured or compiled there cannot depend on more. At the end each has counted
    ``tokens``, or none if there was an error.
    """
    counted = [layer for layer in cache.layers if hasattr(layer, "cumulative_length_int")]
    counts = [layer.cumulative_length_int for layer in counted]
    for layer, count in zip(counted, counts, strict=True):
        is_full = count >= layer.max_cache_len
        layer.cumulative_length_int = layer.max_cache_len if is_full else 0
    new_tokens = 0
    try:
        yield
        new_tokens = tokens
    finally:
        for layer, count in zip(counted, counts, strict=True):
            layer.cumulative_length_int = count + new_tokens


class KVPool:
    """Hands out one static cache at a time, in the memory of the last one where that fits.

    Only once nobody holds the last one (a caller may keep ``past_key_values`` and go on with it).
    """

    def __init__(self) -> None:
        self._layers: list[Any] = []
        self._kind: tuple[Any, ...] | None = None
        self._last: weakref.ref[Cache] | None = None

    def fits(self, config: Any, *, batch_size: int, max_cache_len: int) -> bool:
        """Whether `take` would hand out the memory of the last cache again."""
        is_free = self._last is None or self._last() is None
        return (
            is_free
            and self._kind == _kind(config, batch_size)
            and max(layer.max_cache_len for layer in self._layers) >= max_cache_len
        )

    def take(self, config: Any, *, batch_size: int, max_cache_len: int) -> StaticCache:
        """An empty cache for ``batch_size`` rows of at least ``max_cache_len`` positions."""
        if self.fits(config, batch_size=batch_size, max_cache_len=max_cache_len):
            cache = StaticCache(config=config, max_cache_len=max_cache_len)
            cache.layers[:] = self._layers
            cache.reset()
        else:
            self.clear()  # before the new one is filled: memory holds one at a time
            cache = capturable(StaticCache(config=config, max_cache_len=max_cache_len))
            self._layers, self._kind = list(cache.layers), _kind(config, batch_size)
        self._last = weakref.ref(cache)
        return cache

    def clear(self) -> None:
        """Forget the memory."""
        self._layers, self._kind, self._last = [], None, None


def _kind(config: Any, batch_size: int) -> tuple[Any, ...]:
    # Tensors made in inference mode may be changed there only.
    return (id(config), batch_size, torch.is_inference_mode_enabled())
