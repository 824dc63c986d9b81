"""Budgets: slots per layer to bytes and back, and what a model needs at least.

Knows sizes only. Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from data.schema import MoESpec
from runtime.sizes import parse_bytes

logger = logging.getLogger(__name__)

Scope = Literal["layer", "global"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a cache may hold.

    Args:
        slots: In every layer; None for a pool whose size was given in bytes.
        budget_bytes: Of all layers; None where the experts' sizes are not known.
    """

    slots: int | None
    budget_bytes: int | None


def parse_budgets(
    spec: MoESpec,
    *,
    slots: Sequence[int] = (),
    budget_bytes: Sequence[int] = (),
    scope: Scope = "layer",
) -> list[Budget]:
    """Check budgets given one way or the other, and say them both ways where that is possible.

    A pool (scope "global") of n slots has the bytes of n experts in every layer; a byte budget for
    scope "layer" is cut into the same number of slots in all layers.

    Raises:
        ValueError: Both ways or neither were used, or a budget is too small, too large or unknown.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: must be one of {', '.join(SCOPES)}")
    if bool(slots) == bool(budget_bytes):
        given = "both were" if slots else "neither was"
        raise ValueError(f"give either slots or budget_bytes; {given} given")
    for count in slots:
        check_slots(count, spec)
    if slots:
        return [Budget(slots=n, budget_bytes=bytes_for_slots(n, spec)) for n in slots]
    if scope == "layer":
        return [Budget(slots=slots_for_bytes(n, spec), budget_bytes=n) for n in budget_bytes]
    for count in budget_bytes:
        _check_pool(count, spec)
    return [Budget(slots=None, budget_bytes=count) for count in budget_bytes]


def _check_pool(budget_bytes: int, spec: MoESpec) -> None:
    floor_bytes = working_set_bytes(spec)
    event_bytes = spec.top_k * max(spec.expert_bytes_per_layer or ())
    if budget_bytes < event_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes}: one token needs top-{spec.top_k} experts of a layer at "
            f"once, {event_bytes} bytes"
        )
    if budget_bytes < floor_bytes:
        logger.warning(
            "budget_bytes=%d is below one token's working set of %d bytes: "
            "a global LRU hits next to nothing in decode",
            budget_bytes,
            floor_bytes,
        )


def check_slots(slots: int, spec: MoESpec) -> None:
    """ValueError unless every layer can hold one token's experts, and no more than it has."""
    if not spec.top_k <= slots <= spec.num_experts:
        raise ValueError(
            f"slots={slots}: must be at least top-k={spec.top_k}, so that one token's experts fit, "
            f"and at most the {spec.num_experts} experts of a layer ({spec.describe()})"
        )


def bytes_for_slots(slots: int, spec: MoESpec) -> int | None:
    """Bytes of ``slots`` experts in every layer; None if the spec does not know their sizes."""
    if spec.expert_bytes_per_layer is None:
        return None
    return slots * sum(spec.expert_bytes_per_layer)


def slots_for_bytes(budget_bytes: int, spec: MoESpec) -> int:
    """The most slots per layer, the same in all layers, that ``budget_bytes`` pays for.

    Raises:
        ValueError: The sizes are unknown, or one token's experts would not fit.
    """
    slots = min(budget_bytes // working_set_bytes(spec, num_experts=1), spec.num_experts)
    if slots < spec.top_k:
        raise ValueError(
            f"budget_bytes={budget_bytes}: that is {slots} slots a layer; top-{spec.top_k} routing "
            f"needs {spec.top_k} slots, {working_set_bytes(spec)} bytes"
        )
    return slots


def working_set_bytes(spec: MoESpec, *, num_experts: int | None = None) -> int:
    """What one token touches: its K experts (or ``num_experts`` of them) in every layer.

    The LRU floor: a pool that is smaller, under a global LRU, has evicted a layer's experts before
    the layer comes round again. (Some of one event's K can survive if the pool is too small by less
    than one event; below that decode hits are exactly 0.)
    """
    if spec.expert_bytes_per_layer is None:
        raise ValueError(
            f"budget_bytes: the sizes of the experts of {spec.describe()} are not known; give slots"
        )
    count = spec.top_k if num_experts is None else num_experts
    return count * sum(spec.expert_bytes_per_layer)


def slots_at(residency: float, spec: MoESpec) -> int:
    """Slots per layer that hold the share ``residency`` of the experts, at least K of them.

    Raises:
        ValueError: ``residency`` is not in (0, 1].
    """
    if not 0.0 < residency <= 1.0:
        raise ValueError(f"residency={residency}: must be a share in (0, 1]")
    return max(spec.top_k, round(residency * spec.num_experts))


def parse_budget(text: str, spec: MoESpec) -> int:
    """Slots per layer for a share of the experts, ``"25%"``, or for memory, ``"12GiB"``.

    Raises:
        ValueError: It is neither, or too small.
    """
    share = text.strip().removesuffix("%")
    if share == text.strip():
        return slots_for_bytes(parse_bytes(text), spec)
    try:
        residency = float(share) / 100
    except ValueError:
        raise ValueError(f"budget={text!r}: a share is written as in 25%") from None
    return slots_at(residency, spec)
