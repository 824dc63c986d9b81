"""Testbed "replay": a real model's code at real size, random weights, routing of a real trace.

What a step costs depends on shapes, on which experts are needed and on where they lie; not on what
the weights say. So the model is transformers' own architecture with random weights, and its routers
are made to say what was recorded (`benchmarks.forced_routing`).

All layers hold copies of one random block of experts, so that the testbed starts in seconds: every
layer has its own host memory (a cache or a link sees nothing of the repetition), while stock
transformers, which needs each weight once more in the family's own layout, shares one such block
between the layers.

Random weights prove mechanics, never accuracy. Knows nothing of how rows are timed or reported.

Shape letters: B requests · T tokens · V vocabulary · E experts per layer · D hidden ·
P elements of a record (`runtime.expert_layout`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from benchmarks.forced_routing import ForcedRouting, Route
from benchmarks.replay_shapes import Shape
from data.adapters import MoELayer, expert_parameters, moe_layers, spec_of
from runtime.expert_layout import ExpertLayout
from runtime.pinned_store import PinnedStore

CONTEXT_TOKENS = 1024  # of the static KV cache: attention costs the same at every position of it
MAX_TRIAL_TOKENS = 4  # that a row may decode before it starts anew


class ReplayTestbed:
    """The model, its random experts on both sides of the link, and the routing that is forced.

    Args:
        shape: What to build.
        device: Where the model runs.
        num_tokens: How many tokens to replay after the warm-up.
        dtype: Of all weights.
        warm: Tokens of the warm-up; 0 takes the shape's own number.
        batch: B, parts of the trace that are replayed side by side, each with its own warm-up.

    Raises:
        ValueError: Too few or too many tokens, or the trace does not fit.

    Attributes:
        model: With stock experts of its own layout, which all layers share.
        layers: Its MoE layers.
        layout: Of a record.
        block_EP: The random records on the device; every layer's experts are these.
        routes: What each row of the batch replays.
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
        batch: int = 1,
    ) -> None:
        self.shape, self.device = shape, device
        self.warm = warm or shape.warm
        self.context_tokens = CONTEXT_TOKENS if shape.trace else 128
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
        self.kv = StaticCache(config=self.model.config, max_cache_len=self.context_tokens)
        most_tokens = min(layer.max_cache_len for layer in self.kv.layers)
        if not MAX_TRIAL_TOKENS <= num_tokens <= most_tokens:
            # Beyond a sliding window, a step is another program than before.
            raise ValueError(
                f"tokens={num_tokens}: must be in {MAX_TRIAL_TOKENS}..{most_tokens}, the shortest "
                "window of attention"
            )
        num_tokens += self.warm
        sizes = {"num_layers": self.num_layers, "num_experts": self.num_experts}
        if shape.trace:
            route = Route.recorded(shape, batch * num_tokens, **sizes)
        else:
            route = Route.drawn(batch * num_tokens, top_k=self.top_k, **sizes)
        self.routes = route.rows(batch)
        self.forced = ForcedRouting(self.layers, self.routes, device)
        self._mask = self._open_mask(dtype)
        self.token_BT = torch.zeros(batch, 1, dtype=torch.int64, device=device)
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

    def use_experts(self, implementation: str) -> None:
        """Choose what computes the experts: a name of transformers' ``ALL_EXPERTS_FUNCTIONS``."""
        use_experts(self.layers, implementation)

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


def use_experts(layers: Sequence[MoELayer], implementation: str) -> None:
    """Let a name of transformers' ``ALL_EXPERTS_FUNCTIONS`` compute these layers' experts."""
    configs: dict[int, Any] = {id(moe.experts.config): moe.experts.config for moe in layers}
    for config in configs.values():
        # As a mapping, it sets this config alone and leaves its subconfigs as they are.
        config._experts_implementation = {"": implementation}


def filled_store(layout: ExpertLayout, num_layers: int, block_EP: Tensor) -> PinnedStore:
    """Host memory for every layer's experts, each a copy of one block of them on the device."""
    store = PinnedStore(
        layout=layout, num_layers=num_layers, num_experts=len(block_EP), device=block_EP.device
    )
    for _ in range(num_layers):
        store.add_layer().copy_(block_EP, non_blocking=store.is_pinned)
    return store


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
