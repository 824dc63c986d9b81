"""What a model takes beside its experts, told from its configuration alone.

The model is built on torch's meta device, where tensors have shapes and no memory, and one chunk of
a prompt is run through it there: the KV cache's bytes are read off the cache that its attention
filled, and the most bytes that were alive at once beside weights and cache are what its activations
need. So there is no table of families and no formula for attention: what a family computes is what
is counted, down to the matrix of scores of those that have no fused attention.

Knows nothing of budgets, devices or what the experts' slots take.

Shape letters: B requests · T tokens · L MoE layers · E experts per layer · K experts per token ·
D hidden · P elements of a record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from data.adapters import expert_parameters, moe_layers, spec_of
from data.schema import MoESpec
from runtime.expert_layout import ExpertLayout
from runtime.experts import expert_forward
from runtime.prefill import MAX_ROWS

_ALLOCATION_BYTES = 512  # the CUDA allocator's grain


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes of one model served for ``batch`` requests of up to ``context`` tokens.

    Attributes:
        spec: The model's MoE.
        layout: Of an expert's record.
        weight_bytes: Of everything that is not a routed expert: attention, embeddings, routers,
            shared experts, dense layers.
        token_weight_bytes: Those of them that every token reads: all but the input embedding,
            unless the output head is tied to it.
        kv_bytes: Of the static KV cache.
        activation_bytes: The most that is alive at once in a forward pass of a chunk.
        vocab_size: Words that logits are of.
        context: Positions of the cache.
        batch: B.
        chunk_tokens: T of the pass.
    """

    spec: MoESpec
    layout: ExpertLayout
    weight_bytes: int
    token_weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    vocab_size: int
    context: int
    batch: int
    chunk_tokens: int

    @property
    def experts_bytes(self) -> int:
        """Of all records: what host memory must hold."""
        return self.spec.num_layers * self.spec.num_experts * self.layout.record_bytes


def skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The causal language model of ``config`` without weights, in ``dtype`` or the config's own.

    Raises:
        ValueError: ``config`` is of no causal language model.
    """
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def skeleton_of(
    where: str, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> Any:
    """As `skeleton`, for a folder or an id of the hub; reads config.json and no weights."""
    return skeleton(AutoConfig.from_pretrained(where, revision=revision), dtype)


@torch.no_grad()
def footprint(
    model: nn.Module, *, context: int = 4096, batch: int = 1, chunk_tokens: int = 4096
) -> Footprint:
    """Run a chunk of a prompt through a model without memory, and count.

    Args:
        model: As `skeleton` gives it.
        context: Positions of the KV cache.
        batch: B, requests that are decoded together.
        chunk_tokens: The longest stretch of a prompt that is computed at once, of one request at a
            time; cut down to ``context``.

    Raises:
        ValueError: A number is not positive.
        NotAMoEError: The model has no routed experts that transformers' interface knows.
    """
    for name, value in {"context": context, "batch": batch, "chunk_tokens": chunk_tokens}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    config: Any = model.config
    layers = moe_layers(model)
    layout = ExpertLayout.of(layers[0].experts)
    chunk_tokens = min(chunk_tokens, context)
    cache = _initialized_cache(model, layout, batch=batch, context=context)
    kv_bytes = sum(_nbytes(value) for layer in cache.layers for value in (layer.keys, layer.values))
    prompt_cache = _initialized_cache(model, layout, batch=1, context=context)
    peak = _PeakBytes()
    with _Routed(config, layout), _FusedAttention(), _NoAnswers(), peak:  # type: ignore[no-untyped-call]
        ids_BT = torch.zeros(1, chunk_tokens, dtype=torch.int64, device="meta")
        model(ids_BT, past_key_values=prompt_cache, use_cache=True, logits_to_keep=1)
    routed = {id(p) for moe in layers for _, p in expert_parameters(moe.experts)}
    others = {
        id(tensor): tensor
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in routed
    }
    weight_bytes = sum(map(_nbytes, others.values()))
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = bool(getattr(config, "tie_word_embeddings", False)) or (
        head is not None and head.weight is embedding
    )
    if tied and head is not None and head.weight is not embedding:
        weight_bytes -= _nbytes(head.weight)  # loading a checkpoint would tie them
    return Footprint(
        spec=spec_of(model),
        layout=layout,
        weight_bytes=weight_bytes,
        token_weight_bytes=weight_bytes - (0 if tied else _nbytes(embedding)),
        kv_bytes=kv_bytes,
        activation_bytes=peak.peak_bytes,
        vocab_size=config.get_text_config().vocab_size,
        context=context,
        batch=batch,
        chunk_tokens=chunk_tokens,
    )


def _initialized_cache(model: Any, layout: ExpertLayout, *, batch: int, context: int) -> Any:
    """A static cache whose tensors a one-token pass has made, with its position at 0 again."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    with _Routed(model.config, layout), _FusedAttention(), _NoAnswers():  # type: ignore[no-untyped-call]
        ids_BT = torch.zeros(batch, 1, dtype=torch.int64, device="meta")
        model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        if not isinstance(getattr(layer, "keys", None), Tensor):
            raise ValueError(
                f"a layer of the KV cache is a {type(layer).__name__}, which holds no keys and "
                "values: its size cannot be told"
            )
    return cache


class _Routed:
    """While entered, experts compute for as many tokens as prefill does at once, without memory."""

    _NAME = "moecast-footprint"

    def __init__(self, config: Any, layout: ExpertLayout) -> None:
        self._config, self._layout = config.get_text_config(), layout
        # Made before anything is counted: slots and staging buffers are planned elsewhere.
        self._record_P = torch.empty(layout.record_elements, dtype=layout.dtype, device="meta")

    def __enter__(self) -> None:
        """Install it."""
        self._before = self._config._experts_implementation
        ALL_EXPERTS_FUNCTIONS[self._NAME] = self._forward
        self._config._experts_implementation = {"": self._NAME}

    def __exit__(self, *error: object) -> None:
        """Put back what was there."""
        self._config._experts_implementation = {"": self._before}
        ALL_EXPERTS_FUNCTIONS.pop(self._NAME, None)

    def _forward(
        self,
        experts: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """What `runtime.prefill.PrefillExecutor.forward` allocates when all choose one expert."""
        output_TD = torch.zeros_like(hidden_states)
        ids_N = top_k_index.T.flatten().clamp(max=1).long()
        order_N = ids_N.argsort(stable=True)
        token_N = order_N % len(hidden_states)
        weight_N1 = top_k_weights.T.flatten()[order_N, None]
        rows = slice(0, min(len(hidden_states), MAX_ROWS))
        expert_output_MD = expert_forward(
            experts, self._layout, self._record_P, hidden_states[token_N[rows]]
        )
        weighted_MD = (expert_output_MD * weight_N1[rows]).to(output_TD.dtype)
        return output_TD.index_copy(0, token_N[rows], output_TD[token_N[rows]] + weighted_MD)


class _FusedAttention(TorchFunctionMode):
    """Fused attention makes its output and no matrix of scores; on meta it would be decomposed."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Only the shape of its result."""
        if func is scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return named["query"].new_empty(*named["query"].shape[:-1], named["value"].shape[-1])
        return func(*args, **(kwargs or {}))


class _NoAnswers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Code that looks at a value gets False or 0: so masks are made, as for a later chunk."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """There is no value to look at."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))


class _PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are made while entered and are still referred to.

    Attributes:
        peak_bytes: The most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: dict[int, Any] = {}  # held, so that no new storage takes their identity

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run it, and see what is alive afterwards."""
        for tensor in tree_leaves((args, kwargs)):
            # Weights and cache were there before.
            if isinstance(tensor, Tensor) and _storage_key(tensor) not in self._live:
                self._known[_storage_key(tensor)] = tensor.untyped_storage()
        output = func(*args, **(kwargs or {}))
        for key in [key for key, (ref, _) in self._live.items() if _is_gone(ref)]:
            del self._live[key]
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _storage_key(tensor) not in self._known:
                storage = tensor.untyped_storage()
                blocks = -(-storage.nbytes() // _ALLOCATION_BYTES)
                self._live[_storage_key(tensor)] = (
                    StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                    blocks * _ALLOCATION_BYTES,
                )
        alive_bytes = sum(num_bytes for _, num_bytes in self._live.values())
        self.peak_bytes = max(self.peak_bytes, alive_bytes)
        return output


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
