"""Decode steps captured once and replayed: a token without Python, or a wait, in between.

`DecodeGraph` stands in for a model's ``forward``. A step of one token a row over a static KV cache
is copied into static inputs, run as it is the first time (which compiles kernels and allocates
workspaces), captured the second time, and replayed from then on; there is one graph for each
combination of shapes, plain arguments and KV cache. Every other call goes to the model's own
forward, counted by reason in `OffloadStats.eager_calls` and logged once for each.

``model.generate`` gets static caches (`runtime.static_kv`) and is told not to compile, so that it
and its streamers use the graph by themselves. `DecodeGraph.remove` undoes everything.

Knows nothing of experts. What captures is a `Recorder`, so that all but the capture itself runs on
a CPU.

Shape letters: B requests.
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from runtime.backend import OffloadStats
from runtime.static_kv import KVPool, addresses, positions, set_positions, why_not_capturable

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 16
_INPUTS = ("input_ids", "position_ids", "attention_mask")


class Recorder(Protocol):
    """Turns a step into something that can be repeated with what its static inputs then hold."""

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Prepare ``step``; nothing has been computed before the result is called."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """As `Recorder.record`; the outputs are at the same addresses after every replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a server's, a tokenizer's) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()
        self._pool = graph.pool()

        def replay() -> Any:
            graph.replay()
            return output

        return replay


class PlainRecorder:
    """Repeats a step by calling it again: what a CPU can do, and what tests compare with."""

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """As `Recorder.record`."""
        return step


def recorder_for(model: nn.Module) -> Recorder:
    """The recorder for the device that a model is on."""
    is_cuda = next(model.parameters()).device.type == "cuda"
    return CudaRecorder() if is_cuda else PlainRecorder()


class _Step:
    """One kind of step: its static inputs and, from the second call on, its recording."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        with torch.inference_mode(mode=False):  # ordinary tensors can be written in any mode
            self.inputs = pytree.tree_map(
                lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, inputs
            )
        self.has_run = False
        self.replay: Callable[[], Any] | None = None

    def copy_in(self, inputs: Mapping[str, Any]) -> None:
        ours, theirs = pytree.tree_leaves(self.inputs), pytree.tree_leaves(inputs)
        for static, given in zip(ours, theirs, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)


class DecodeGraph:
    """Replaces ``model.forward`` by one that replays captured decode steps, until `remove`.

    Args:
        model: A transformers model whose decode step never waits for the host.
        recorder: Captures the steps.
        max_batch: The most rows of a step that is captured.
    """

    def __init__(self, model: Any, *, recorder: Recorder, max_batch: int) -> None:
        self._model = model
        self._recorder = recorder
        self._max_batch = max_batch
        self._eager: Callable[..., Any] = model.forward
        self._steps: dict[Any, _Step] = {}
        self._failed: dict[Any, str] = {}
        self._captures = self._replays = 0
        self._eager_calls: Counter[str] = Counter()
        self._kv = KVPool()
        config = model.generation_config
        self._before = {
            "forward": vars(model).get("forward"),
            "_prepare_static_cache": vars(model).get("_prepare_static_cache"),
            "_previous_max_cache_length": vars(model).get("_previous_max_cache_length"),
        }
        self._config_before = (config.cache_implementation, config.disable_compile)
        stock_cache = model._prepare_static_cache

        # Both keep the signatures of what they stand for: transformers reads them.
        @functools.wraps(self._eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(args, kwargs)

        @functools.wraps(stock_cache)
        def prepare_static_cache(
            cache_implementation: str,
            batch_size: int,
            max_cache_len: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if cache_implementation != "static" or model.config.is_encoder_decoder:
                return stock_cache(cache_implementation, batch_size, max_cache_len, *args, **kwargs)
            text_config = model.config.get_text_config(decoder=True)
            return self._kv.take(text_config, batch_size=batch_size, max_cache_len=max_cache_len)

        model.forward = forward
        model._prepare_static_cache = prepare_static_cache
        if config.cache_implementation is None:
            config.cache_implementation = "static"
        config.disable_compile = True

    def add_to(self, stats: OffloadStats) -> OffloadStats:
        """The same figures, with those of the graphs."""
        return dataclasses.replace(
            stats,
            graph_captures=self._captures,
            graph_replays=self._replays,
            eager_calls=dict(self._eager_calls),
        )

    def remove(self) -> None:
        """Give the model its own forward back, and free graphs and KV cache."""
        for name, value in self._before.items():
            vars(self._model).pop(name, None)
            if value is not None:
                setattr(self._model, name, value)
        config = self._model.generation_config
        config.cache_implementation, config.disable_compile = self._config_before
        self._steps.clear()
        self._kv.clear()

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reason = self._why_eager(args, kwargs)
        if reason is None:
            cache = kwargs["past_key_values"]
            inputs = {key: value for key, value in kwargs.items() if key != "past_key_values"}
            leaves, structure = pytree.tree_flatten(inputs)
            key = (
                structure,
                tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves),
                addresses(cache),
                torch.is_inference_mode_enabled(),
            )
            reason = self._failed.get(key)
            if reason is None:
                return self._run(key, inputs, cache)
        if reason not in self._eager_calls:
            logger.info("Not captured: forward passes with %s", reason)
        self._eager_calls[reason] += 1
        return self._eager(*args, **kwargs)

    def _run(self, key: Any, inputs: dict[str, Any], cache: Cache) -> Any:
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _MAX_GRAPHS:
                self._steps.pop(next(iter(self._steps)))  # the oldest
            step = self._steps[key] = _Step(inputs)
        step.copy_in(inputs)
        counts = positions(cache)
        if not step.has_run:
            output = self._eager(**step.inputs, past_key_values=cache)
            step.has_run = True
            self._eager_calls["first of its kind"] += 1
        else:
            if step.replay is None:
                try:
                    step.replay = self._record(step, cache)
                except RuntimeError as error:
                    # Nothing has been computed yet. A device that is broken will say so again.
                    set_positions(cache, counts)
                    self._steps.pop(key)
                    self._failed[key] = "a step that cannot be captured"
                    logger.warning("A decode step could not be captured: %s", error)
                    return self._forward((), {**inputs, "past_key_values": cache})
            output = step.replay()
            self._replays += 1
        set_positions(cache, counts, advance=1)  # the host's own counting is not in the graph
        return _copy_out(output, cache)

    def _record(self, step: _Step, cache: Cache) -> Callable[[], Any]:
        inputs = step.inputs
        replay = self._recorder.record(lambda: self._eager(**inputs, past_key_values=cache))
        self._captures += 1
        logger.info("Captured a decode step of %d rows", len(inputs["input_ids"]))
        return replay

    def _why_eager(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        ids_B1 = kwargs.get("input_ids")
        if args or not isinstance(ids_B1, Tensor) or kwargs.get("inputs_embeds") is not None:
            return "other inputs than input_ids by name"
        if ids_B1.dim() != 2 or ids_B1.shape[1] != 1:
            return "several tokens a row"
        if len(ids_B1) > self._max_batch:
            return f"more than {self._max_batch} rows"
        if self._model.training or torch.is_grad_enabled():
            return "gradients or training mode"
        if reason := why_not_capturable(kwargs.get("past_key_values")):
            return reason
        for name, value in kwargs.items():
            is_asked = value is True and (name.startswith("output_") or name == "labels")
            if is_asked or (name == "labels" and value is not None):
                return name
        if not isinstance(kwargs.get("position_ids"), Tensor):
            return "positions left to the model"  # it would count them on the host
        masks = pytree.tree_leaves(kwargs.get("attention_mask"))
        if not masks or any(not isinstance(mask, Tensor) or mask.dim() != 4 for mask in masks):
            return "a mask left to the model"
        device = next(self._model.parameters()).device
        leaves = [x for x in pytree.tree_leaves(dict(kwargs)) if isinstance(x, Tensor)]
        if any(leaf.device != device for leaf in leaves):
            return "inputs on another device"
        others = [x for x in pytree.tree_leaves(dict(kwargs)) if not isinstance(x, Tensor | Cache)]
        if any(not isinstance(x, bool | int | float | str | None) for x in others):
            return "arguments that are no plain values"
        return None


def _copy_out(output: Any, cache: Cache) -> Any:
    """What a caller may keep: the next replay writes over the recording's own outputs."""

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return cache if isinstance(leaf, Cache) else leaf

    return pytree.tree_map(own, output, is_leaf=lambda leaf: isinstance(leaf, Cache))
