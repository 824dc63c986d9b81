"""Decode steps captured once and replayed: a token without Python, or a wait, in between.

`DecodeGraph` stands in for a model's ``forward``. A step of one token a row over a static KV cache
is copied into static inputs, run as it is the first time (which compiles kernels and allocates
workspaces), captured the second time, and replayed from then on; there is one graph for each
combination of shapes, plain arguments and KV cache. Every other call goes to the model's own
forward, counted by reason in `OffloadStats.eager_calls` and logged once for each.

``model.generate`` gets static caches (`runtime.static_kv`) unless it is told otherwise, and does
not compile, so that it and its streamers use the graph by themselves. `DecodeGraph.remove` undoes
everything.

Knows nothing of experts. What captures is a `Recorder`, so that all but the capture itself runs on
a CPU.

Shape letters: B requests.
"""

import dataclasses
import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from runtime.backend import OffloadStats
from runtime.compiled_layers import CompiledLayers
from runtime.static_kv import KVPool, addresses, one_position, why_not_capturable

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 16
_MIN_CACHE_TOKENS = 256


_StepFn = Callable[[Cache], Any]


class Recorder(Protocol):
    """Turns a step into something that can be repeated with what its static inputs then hold."""

    def record(self, step: _StepFn, cache: Cache) -> _StepFn:
        """Prepare ``step`` over ``cache``; nothing has been computed before the result is called.

        The result must not keep ``cache`` alive (nor may what it returns hold it): its memory is
        used again only once nobody has it. It is called with whatever cache lies in that memory.
        """
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory, as long as there is one of them.

    A pool whose last graph has gone must not be captured into again: torch's allocator may still
    hold it, for a tensor that somebody kept, and refuses.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def record(self, step: _StepFn, cache: Cache) -> _StepFn:
        """As `Recorder.record`; the outputs are at the same addresses after every replay."""
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._graphs), None)
        # Other threads (a server's, a tokenizer's) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = without_cache(step(cache))
        self._graphs.add(graph)

        def replay(cache: Cache) -> Any:
            graph.replay()
            return output

        return replay


class PlainRecorder:
    """Repeats a step by calling it again: what a CPU can do, and what tests compare with."""

    def record(self, step: _StepFn, cache: Cache) -> _StepFn:
        """As `Recorder.record`."""
        return lambda cache: without_cache(step(cache))


class _CacheHere:
    """Stands in a step's output for the KV cache that the step was over."""


def without_cache(output: Any) -> Any:
    """A step's output, to be kept: it does not hold the cache."""
    return pytree.tree_map(
        lambda leaf: _CacheHere if isinstance(leaf, Cache) else leaf,
        output,
        is_leaf=lambda leaf: isinstance(leaf, Cache),
    )


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
        self.replay: _StepFn | None = None

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
        compiled: The model's layers, for the steps that are captured; None leaves them as they are.
        hold: Asked before each step: why it must run as it is; None if it need not.
        before_request: Called where a static KV cache is asked for: a request begins, and none is
            being served.
    """

    def __init__(
        self,
        model: Any,
        *,
        recorder: Recorder,
        max_batch: int,
        compiled: CompiledLayers | None = None,
        hold: Callable[[], str | None] = lambda: None,
        before_request: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._recorder = recorder
        self._max_batch = max_batch
        self._compiled: Callable[[], AbstractContextManager[None]] = (
            nullcontext if compiled is None else compiled.in_use
        )
        self._hold, self._before_request = hold, before_request
        self._is_stale = False
        self._eager: Callable[..., Any] = model.forward
        self._steps: dict[Any, _Step] = {}
        self._failed: dict[Any, str] = {}
        self._captures = self._replays = 0
        self._eager_calls: Counter[str] = Counter()
        self._kv = KVPool()
        replaced = {
            "forward": self._forward,
            "_prepare_cache_for_generation": self._prepare_cache,
            "_prepare_static_cache": self._prepare_static_cache,
        }
        names = (*replaced, "_previous_max_cache_length")
        self._before = {name: vars(model)[name] for name in names if name in vars(model)}
        self._stock = {name: getattr(model, name) for name in replaced}
        for name, ours in replaced.items():
            # With the signature of what it stands for: transformers reads it.
            setattr(
                model, name, functools.update_wrapper(functools.partial(ours), self._stock[name])
            )

    def new_cache(self, max_tokens: int, *, context_tokens: int | None = None) -> Any:
        """An empty KV cache of one sequence, over which steps are captured; one at a time.

        Args:
            max_tokens: The most positions that it will hold. Rounded up, so that sequences of about
                the same length share a graph.
            context_tokens: What memory was planned for: no more is allocated unless it is needed.
        """
        rounded = max(_MIN_CACHE_TOKENS, 1 << (max_tokens - 1).bit_length())
        if context_tokens is not None:
            rounded = max(max_tokens, min(rounded, context_tokens))
        return self._prepare_static_cache("static", 1, rounded)

    def add_to(self, stats: OffloadStats) -> OffloadStats:
        """The same figures, with those of the graphs."""
        return dataclasses.replace(
            stats,
            graph_captures=self._captures,
            graph_replays=self._replays,
            eager_calls=dict(self._eager_calls),
        )

    def forget(self) -> None:
        """Capture steps anew, since what they consist of has changed; also from within a step."""
        self._is_stale = True

    def remove(self) -> None:
        """Give the model its own methods back, and free graphs and KV cache."""
        for name in (*self._stock, "_previous_max_cache_length"):
            vars(self._model).pop(name, None)
        for name, value in self._before.items():
            setattr(self._model, name, value)
        self._steps.clear()
        self._kv.clear()

    def _prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Where ``generate`` was not told which KV cache to use, choose the static one.

        ``generation_config`` is the call's own copy. Set on the model's, the choice would make
        ``generate`` refuse a cache that its caller brings. Beam and assisted search, and flash
        attention (which needs the mask that was dropped by now), cannot use static caches or gain
        nothing by them.
        """
        generation_config.disable_compile = True
        if (
            generation_config.cache_implementation is None
            and model_kwargs.get("past_key_values") is None
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and "flash" not in str(self._model.config._attn_implementation)
        ):
            generation_config.cache_implementation = "static"
        prepare = self._stock["_prepare_cache_for_generation"]
        return prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kw: Any
    ) -> Any:
        """A cache from the pool, for the kind that steps are captured over."""
        if cache_implementation != "static" or self._model.config.is_encoder_decoder:
            stock = self._stock["_prepare_static_cache"]
            return stock(cache_implementation, batch_size, max_cache_len, *args, **kw)
        self._before_request()
        text_config = self._model.config.get_text_config(decoder=True)
        if not self._kv.fits(text_config, batch_size=batch_size, max_cache_len=max_cache_len):
            self._steps.clear()  # their cache's memory goes, and theirs with it
            self._failed.clear()  # whose addresses the next one may have
        return self._kv.take(text_config, batch_size=batch_size, max_cache_len=max_cache_len)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_stale:
            self._steps.clear()
            self._failed.clear()
            self._is_stale = False
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
        if step.has_run and step.replay is None:
            try:
                step.replay = self._record(step, cache)
            except RuntimeError as error:
                # Nothing has been computed yet. A device that is broken will say so again.
                self._steps.pop(key)
                if len(self._failed) >= _MAX_GRAPHS:
                    self._failed.pop(next(iter(self._failed)))
                self._failed[key] = "a step that cannot be captured"
                logger.warning("A decode step could not be captured: %s", error)
                return self._forward(**inputs, past_key_values=cache)
        with one_position(cache, tokens=1):  # the host's own counting is not in the graph
            if step.replay is None:
                with self._compiled():
                    output = without_cache(self._eager(**step.inputs, past_key_values=cache))
                step.has_run = True
                self._eager_calls["first of its kind"] += 1
            else:
                output = step.replay(cache)
                self._replays += 1
        return _copy_out(output, cache)

    def _record(self, step: _Step, cache: Cache) -> _StepFn:
        inputs = step.inputs

        def run(cache: Cache) -> Any:
            with self._compiled():
                return self._eager(**inputs, past_key_values=cache)

        with one_position(cache, tokens=0):
            replay = self._recorder.record(run, cache)
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
        if reason := self._hold() or why_not_capturable(kwargs.get("past_key_values")):
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
        return cache if leaf is _CacheHere else leaf

    return pytree.tree_map(own, output)
