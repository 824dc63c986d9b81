"""Testbed "replay": a real model's code at real size, random weights, routing of a real trace.

What a step costs depends on shapes, on which experts are needed and on where they lie; not on what
the weights say. So the model is transformers' own architecture with random weights, and a hook on
each router puts the recorded experts in place of what random weights would choose. The hook reads
them from a device tensor at a position that the device counts itself: it works in eager mode and
inside a captured graph alike, and nothing waits for the host.

All layers hold copies of one random block of experts, so that the testbed starts in seconds: every
layer has its own host memory (a cache or a link sees nothing of the repetition), while stock
transformers runs, which need each weight once more in the family's own layout, share one such block
between the layers.

Random weights prove mechanics, never accuracy. Knows nothing of how rows are timed or reported.

Shape letters: B requests · T tokens · N replayed tokens · L MoE layers · E experts per layer ·
K experts per token · D hidden · P elements of a record (`runtime.expert_layout`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from data.adapters import MoELayer, expert_parameters, moe_layers, spec_of
from data.importers import load_traces
from runtime.expert_layout import ExpertLayout

CONTEXT_TOKENS = 1024  # of the static KV cache: attention costs the same at every position of it


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shape and the trace that is replayed on it.

    Args:
        trace: A name of `data.importers.catalog.TRACES`; "" draws a skewed random routing.
        family: The model type of transformers.
        config: What differs from the family's defaults.
        start: The first routed token that is replayed.
        warm: Tokens before the measured ones that only fill the cache.
    """

    trace: str
    family: str
    config: Mapping[str, Any]
    start: int = 0
    warm: int = 256

    def small(self) -> "Shape":
        """The same family with 2 MoE layers of 8 small experts, top-2: for tests on a CPU."""
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 64,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "num_experts": 8,
            "n_routed_experts": 8,
            "num_hidden_layers": 2 + self.config.get("first_k_dense_replace", 0),
            "vocab_size": 128,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
        config = {**self.config, **{k: v for k, v in sizes.items() if k in self.config}}
        return dataclasses.replace(self, trace="", config=config, start=0, warm=6)


_UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": None}
SHAPES: Mapping[str, Shape] = {
    "gptoss20b": Shape(
        trace="gptoss20b",
        family="gpt_oss",
        start=2000,
        config={
            **_UNTIED,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 201_088,
        },
    ),
    "dsv2lite": Shape(
        trace="esft",
        family="deepseek_v2",
        start=2000,
        config={
            **_UNTIED,
            "hidden_size": 2048,
            "intermediate_size": 10_944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 102_400,
        },
    ),
    # The recording engine used 6 of the model's 8 experts per token; what it used is replayed.
    "qwen3_30b": Shape(
        trace="qwen",
        family="qwen3_moe",
        warm=80,
        config={
            **_UNTIED,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
            "vocab_size": 151_936,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Route:
    """The recorded routing of consecutive tokens, and the truth about what comes after each.

    Attributes:
        ids_NLK: int64.
        weights_NLK: float32, each token's weights sum to 1.
        next_use_NLE: float32, minus the number of the next token that uses the expert, -inf =
            never: what `Belady` is told of the time after token n.
        digest: Names the trace's content.
    """

    ids_NLK: Tensor
    weights_NLK: Tensor
    next_use_NLE: Tensor
    digest: str

    @classmethod
    def of(cls, ids_NLK: Tensor, weights_NLK: Tensor, num_experts: int, digest: str) -> "Route":
        """Normalise the weights and look ahead."""
        num_tokens, num_layers, _ = ids_NLK.shape
        next_use_NLE = torch.empty(num_tokens, num_layers, num_experts)
        next_LE = torch.full((num_layers, num_experts), -torch.inf)
        for n in range(num_tokens - 1, -1, -1):
            next_use_NLE[n] = next_LE
            next_LE.scatter_(1, ids_NLK[n], -float(n))
        total_NL1 = weights_NLK.sum(-1, keepdim=True).clamp_min(1e-9)
        return cls(
            ids_NLK=ids_NLK,
            weights_NLK=weights_NLK / total_NL1,
            next_use_NLE=next_use_NLE,
            digest=digest,
        )

    @classmethod
    def recorded(
        cls, shape: Shape, num_tokens: int, *, num_layers: int, num_experts: int
    ) -> "Route":
        """Tokens ``start .. start + num_tokens`` of the shape's trace, each as one decode step.

        Requests follow each other as they were recorded; the cache lives through them.

        Raises:
            ValueError: The trace is too short, or not of this shape.
        """
        traces = load_traces(shape.trace)
        top_k = shape.config["num_experts_per_tok"]
        spec = traces.spec
        if (spec.num_layers, spec.num_experts, spec.top_k) != (num_layers, num_experts, top_k):
            raise ValueError(
                f"trace {shape.trace}: {spec.describe()}, the model has {num_layers} MoE layers x "
                f"{num_experts} experts, top-{top_k}"
            )
        requests = [traces[i] for i in range(len(traces))]
        stop = shape.start + num_tokens
        ids_NLK = np.concatenate([trace.topk_expert_ids_TLK for trace in requests])[:stop]
        if len(ids_NLK) < stop:
            raise ValueError(
                f"trace {shape.trace} has {len(ids_NLK)} tokens: {stop} are needed for "
                f"{num_tokens} from {shape.start} on"
            )
        weights_NLK = np.ones(ids_NLK.shape, np.float32)
        if all(trace.topk_probs_TLK is not None for trace in requests):
            weights_NLK = np.concatenate([t.topk_probs_TLK for t in requests])[:stop]  # type: ignore[misc]
        rows = slice(shape.start, stop)
        return cls.of(
            torch.from_numpy(ids_NLK[rows].astype(np.int64)),
            torch.from_numpy(weights_NLK[rows].astype(np.float32)),
            num_experts,
            traces.digest,
        )

    @classmethod
    def drawn(cls, num_tokens: int, *, num_layers: int, num_experts: int, top_k: int) -> "Route":
        """A random routing in which each layer has favourites; for tests."""
        generator = torch.Generator().manual_seed(0)
        taste_LE = torch.rand(num_layers, num_experts, generator=generator) * 2
        noise_NLE = torch.rand(num_tokens, num_layers, num_experts, generator=generator)
        weights_NLK, ids_NLK = (taste_LE + noise_NLE).topk(top_k)
        return cls.of(ids_NLK, weights_NLK, num_experts, "drawn with seed 0")


class ForcedRouting:
    """Hooks that make a model route as recorded, token after token.

    Attributes:
        position_1: int64 on the device, the token that the next forward pass replays; it counts by
            itself (in the last layer's router) and wraps around.
        forecast_LE: float32 [L, E] on the device, what is true of the time after that token; made
            ready before layer 0 computes its experts.
    """

    def __init__(self, layers: list[MoELayer], route: Route, device: torch.device) -> None:
        self._ids_NLK = route.ids_NLK.to(device)
        self._weights_NLK = route.weights_NLK.to(device)
        self._next_use_NLE = route.next_use_NLE.to(device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.forecast_LE = torch.zeros_like(self._next_use_NLE[0])
        self._handles = [
            moe.router.register_forward_hook(self._hook_of(moe.layer, len(layers)))
            for moe in layers
        ]

    def seek(self, position: int) -> None:
        """Let the next forward pass replay token ``position``."""
        self.position_1.fill_(position)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook_of(self, layer: int, num_layers: int) -> Any:
        def hook(router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits, weights_TK, ids_TK = output
            if layer == 0:
                self.forecast_LE.copy_(self._next_use_NLE.index_select(0, self.position_1)[0])
            ids_TK = self._ids_NLK[:, layer].index_select(0, self.position_1).to(ids_TK.dtype)
            weights = self._weights_NLK[:, layer].index_select(0, self.position_1)
            if layer == num_layers - 1:
                self.position_1.add_(1).remainder_(len(self._ids_NLK))
            return logits, weights.to(weights_TK.dtype), ids_TK

        return hook


class ReplayTestbed:
    """The model, its random experts on both sides of the link, and the routing that is forced.

    Args:
        shape: What to build.
        device: Where the model runs.
        num_tokens: How many tokens to replay after the warm-up.
        dtype: Of all weights.
        warm: Tokens of the warm-up; 0 takes the shape's own number.

    Attributes:
        model: With stock experts of its own layout, which all layers share.
        layers: Its MoE layers.
        layout: Of a record.
        block_EP: The random records on the device; every layer's experts are these.
        forced: The hooks on the routers.
        logits_BTV: Of the latest step; a graph may write there again.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        device: torch.device,
        num_tokens: int,
        dtype: torch.dtype,
        warm: int = 0,
    ) -> None:
        self.shape, self.device = shape, device
        self.warm = warm or shape.warm
        self.context_tokens = CONTEXT_TOKENS if shape.trace else 32
        torch.manual_seed(0)
        self.model = build_model(shape, device, dtype)
        self.layers = moe_layers(self.model)
        self.layout = ExpertLayout.of(self.layers[0].experts)
        self.spec = spec_of(self.model, model_id=shape.family)
        self.num_layers, self.num_experts = self.spec.num_layers, self.spec.num_experts
        self.top_k = self.spec.top_k
        # Gates and outputs of about 1 for normalised inputs: nothing grows, whatever is routed.
        std = self.layout.hidden_size**-0.5
        self.block_EP = torch.empty(
            self.num_experts, self.layout.record_elements, dtype=dtype, device=device
        ).normal_(std=std)
        self.stock = self._stock_parameters()
        self.use_stock_experts()
        num_tokens += self.warm
        sizes = {"num_layers": self.num_layers, "num_experts": self.num_experts}
        if shape.trace:
            self.route = Route.recorded(shape, num_tokens, **sizes)
        else:
            self.route = Route.drawn(num_tokens, top_k=self.top_k, **sizes)
        self.forced = ForcedRouting(self.layers, self.route, device)
        self.kv = StaticCache(config=self.model.config, max_cache_len=self.context_tokens)
        self._mask = self._open_mask(dtype)
        self.token_BT = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._position_BT = torch.zeros_like(self.token_BT)
        self.logits_BTV = torch.full((1, 1, 1), torch.nan, device=device)

    def describe(self) -> str:
        """One line for people."""
        layout = self.layout
        return (
            f"{self.shape.family} with {self.num_layers} MoE layers x {self.num_experts} experts, "
            f"top-{self.top_k}, D={layout.hidden_size}, F={layout.expert_intermediate_size}, "
            f"{str(layout.dtype).removeprefix('torch.')}"
        )

    def rewind(self) -> None:
        """Go back to the first measured token, with an empty context."""
        self.forced.seek(self.warm)
        self.token_BT.zero_()
        self._position_BT.zero_()
        self.kv.reset()

    def step(self, forward: Any) -> None:
        """Decode one token greedily through ``forward``, the model's own or a stand-in.

        It attends to the whole allocated context, as if that was full: what has no key yet counts
        as a key of zeros.
        """
        output = forward(
            input_ids=self.token_BT,
            position_ids=self._position_BT,
            attention_mask=self._mask,
            past_key_values=self.kv,
            use_cache=True,
        )
        self.logits_BTV = output.logits
        self.token_BT.copy_(output.logits[:, -1:].argmax(-1))
        self._position_BT.add_(1)

    def use_stock_experts(self) -> None:
        """Give every experts module the shared parameters in the family's own layout."""
        for moe in self.layers:
            for name, _ in list(expert_parameters(moe.experts)):
                moe.experts._parameters[name] = self.stock[name]

    def _open_mask(self, dtype: torch.dtype) -> Any:
        """What lets a token see all of the context, in the form that the family expects."""
        length_of = dict.fromkeys(["full_attention"], self.context_tokens)
        layer_types = self.model.config.layer_types if self.shape.family == "gpt_oss" else ()
        for kind, layer in zip(layer_types, self.kv.layers, strict=False):
            length_of[kind] = layer.max_cache_len
        masks = {
            kind: torch.zeros(1, 1, 1, length, dtype=dtype, device=self.device)
            for kind, length in length_of.items()
        }
        return masks if layer_types else masks["full_attention"]

    def _stock_parameters(self) -> dict[str, nn.Parameter]:
        tensors = {
            name: torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            for name, parameter in expert_parameters(self.layers[0].experts)
        }
        for expert in range(self.num_experts):
            self.layout.unpack(self.block_EP[expert], tensors, expert)
        return {name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The family's model with random weights, its experts left on the meta device.

    Matrices are drawn so that normalised inputs give outputs of about 1.
    """
    config = AutoConfig.for_model(shape.family, **shape.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts = {id(moe.experts) for moe in moe_layers(model)}
    for module in model.modules():
        if id(module) in experts:
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.dim() > 1:
                drawn.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                drawn.fill_(0.0 if "bias" in name or "sinks" in name else 1.0)
            module._parameters[name] = nn.Parameter(drawn, requires_grad=False)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            # Only rotary embeddings hold buffers; they compute them from the configuration.
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=config).to(device))
    return model.eval()
