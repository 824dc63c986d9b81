"""What a loaded model's MoE is: its layers, its sizes and the meaning of its router's logits.

One adapter serves every family that routes through transformers' ``ExpertsInterface`` (5.17 and
later). Such a family's experts module carries the interface's flags (``is_transposed``,
``is_concatenated``, ``has_bias``, ``has_gate``), and its router class is the one that the model
records for ``output_router_logits``; so nothing here is a table of families.

Deliberately knows nothing of traces, caches or where experts lie.

Shape letters: T tokens · L MoE layers · E experts per layer · D hidden · F expert FFN inner size.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.adapters.fingerprint import config_digest
from data.errors import NotAMoEError
from data.schema import MoESpec

__all__ = ["MoELayer", "config_digest", "moe_layers", "probs_kind", "router_probs_TE", "spec_of"]

_INTERFACE_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
_ROUTER_NAMES = ("gate", "router")
# These routers return softmax probabilities where all others return logits.
_RETURN_PROBABILITIES = frozenset({"Gemma4TextRouter", "DiffusionGemmaTextRouter"})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MoELayer:
    """One MoE layer of a loaded model.

    Attributes:
        layer: Its index among MoE layers, 0..L-1.
        decoder_layer: The transformer's own index.
        experts: The module that holds the routed experts' weights, three-dimensional.
        router: The module whose forward returns (logits, weights, expert ids).
    """

    layer: int
    decoder_layer: int
    experts: nn.Module
    router: nn.Module

    @property
    def num_experts(self) -> int:
        """E of this layer."""
        return int(self._down_proj.shape[0])

    @property
    def expert_intermediate_size(self) -> int:
        """F of this layer."""
        return int(self._down_proj.shape[1 if self.experts.is_transposed else 2])

    @property
    def hidden_size(self) -> int:
        """D: what goes into one of this layer's experts and comes out."""
        return int(self._down_proj.shape[2 if self.experts.is_transposed else 1])

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, biases included, in the dtype that the model is loaded in."""
        return sum(
            parameter.numel() // self.num_experts * parameter.element_size()
            for _, parameter in expert_parameters(self.experts)
        )

    @property
    def _down_proj(self) -> Tensor:
        down_proj = self.experts.down_proj
        assert isinstance(down_proj, Tensor)
        return down_proj


def expert_parameters(experts: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The per-expert parameters of an experts module, by name: matrices first, then biases."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [up, "down_proj"]
    if experts.has_bias:
        names += [f"{up}_bias", "down_proj_bias"]
    for name in names:
        yield name, getattr(experts, name)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find the MoE layers of ``model``, ascending.

    Args:
        model: A transformers model; weights on the meta device will do.

    Raises:
        NotAMoEError: No module routes through ``ExpertsInterface``, or several stacks of experts
            share decoder layers (a model of several towers: pass the one to be observed).
    """
    recorded = _recorded_router_classes(model)
    layers: list[MoELayer] = []
    for name, module in model.named_modules():
        if not _is_experts(module):
            continue
        parent_name = name.rpartition(".")[0]
        indices = [int(part) for part in name.split(".") if part.isdecimal()]
        if not indices:
            raise NotAMoEError(f"{name}: its name holds no decoder layer index")
        layers.append(
            MoELayer(
                layer=len(layers),
                decoder_layer=indices[-1],
                experts=module,
                router=_router_beside(model.get_submodule(parent_name), parent_name, recorded),
            )
        )
    if not layers:
        raise NotAMoEError(
            f"{_describe(model)} routes no tokens through transformers' ExpertsInterface: it is "
            "a dense model, or its family brings its own expert forward"
        )
    decoder_layers = [moe.decoder_layer for moe in layers]
    if decoder_layers != sorted(set(decoder_layers)):
        raise NotAMoEError(
            f"{_describe(model)} has several stacks of experts (decoder layers {decoder_layers}): "
            "pass the submodel to be observed"
        )
    return layers


def spec_of(model: nn.Module, model_id: str | None = None) -> MoESpec:
    """Describe the MoE of a loaded model.

    Args:
        model: A transformers model; weights on the meta device will do.
        model_id: How the user named it; by default the name that it was loaded under.

    Raises:
        NotAMoEError: As `moe_layers`, or its layers differ in their number of experts.
    """
    layers = moe_layers(model)
    config: Any = model.config
    shapes = {(moe.num_experts, moe.hidden_size, moe.expert_intermediate_size) for moe in layers}
    if len(shapes) > 1:
        raise NotAMoEError(
            f"{_describe(model)} has MoE layers of different shapes {sorted(shapes)} (experts, "
            "hidden size, inner size): one MoESpec cannot describe them"
        )
    num_experts, hidden_size, expert_intermediate_size = shapes.pop()
    return MoESpec(
        model_id=model_id or getattr(config, "_name_or_path", "") or config.model_type,
        num_experts=num_experts,
        top_k=_top_k(layers[0].router, config),
        decoder_layers=tuple(moe.decoder_layer for moe in layers),
        expert_bytes_per_layer=tuple(moe.expert_bytes for moe in layers),
        hidden_size=hidden_size,
        expert_intermediate_size=expert_intermediate_size,
        fingerprint=config_digest(config),
    )


def probs_kind(model: nn.Module) -> Literal["softmax", "sigmoid"]:
    """Say what `router_probs_TE` returns for this model."""
    return _scoring(moe_layers(model)[0].router)


@torch.no_grad()
def router_probs_TE(moe_layer: MoELayer, router_logits_TE: Tensor) -> Tensor:
    """Turn a router's first output into probabilities: float32 [T, E], each row sums to 1.

    Softmax of the logits; for routers that score each expert by itself (DeepSeek-V3's sigmoid),
    the scores divided by their sum, which keeps their order and makes an expert map of them. Biases
    that only steer selection (``e_score_correction_bias``) are left out: they balance load and say
    nothing about the token.

    Args:
        moe_layer: The layer that the logits come from.
        router_logits_TE: What the router returned first, any float dtype.
    """
    logits_TE = router_logits_TE.detach().float()
    if type(moe_layer.router).__name__ in _RETURN_PROBABILITIES:
        return logits_TE
    if _scoring(moe_layer.router) == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-9)
    return logits_TE.softmax(-1)


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in _INTERFACE_FLAGS)


def _recorded_router_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes that the model or its submodels record as ``router_logits``."""
    classes: set[type[nn.Module]] = set()
    for module in model.modules():
        record = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for entry in record if isinstance(record, list) else [record]:
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                classes.add(target)
    return tuple(classes)


def _router_beside(
    parent: nn.Module, parent_name: str, recorded: tuple[type[nn.Module], ...]
) -> nn.Module:
    """The router among the siblings of an experts module."""
    children = dict(parent.named_children())
    for child in children.values():
        if isinstance(child, recorded):
            return child
    for name in _ROUTER_NAMES:  # models that record a class around the router
        if name in children:
            return children[name]
    raise NotAMoEError(f"{parent_name} has experts but no router beside them: {sorted(children)}")


def _top_k(router: nn.Module, config: Any) -> int:
    for owner in (router, config.get_text_config()):
        for name in ("top_k", "num_experts_per_tok", "top_k_experts"):
            if isinstance(value := getattr(owner, name, None), int):
                return value
    raise NotAMoEError(f"{type(router).__name__} does not say how many experts a token takes")


def _scoring(router: nn.Module) -> Literal["softmax", "sigmoid"]:
    """How a router turns logits into scores, as its configuration or else its code says.

    Any scoring but these two (DeepSeek-V4's square root of a softplus) is given as softmax.
    """
    configured = getattr(router, "expert_selection_fn", None)
    if configured == "softmax" or configured == "sigmoid":
        return configured  # type: ignore[no-any-return]
    calls_sigmoid = "sigmoid" in inspect.unwrap(type(router).forward).__code__.co_names
    owns_sigmoid = any(isinstance(child, nn.Sigmoid) for child in router.children())
    return "sigmoid" if calls_sigmoid or owns_sigmoid else "softmax"


def _describe(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"model type {model_type!r}" if model_type else type(model).__name__
