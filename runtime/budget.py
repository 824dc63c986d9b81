"""From how much memory a user grants to how many slots each MoE layer gets.

Knows nothing of models and caches, only of sizes. Every layer gets the same number of slots.

Shape letters: L MoE layers · E experts per layer · K experts per token · C slots.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from data.schema import MoESpec

logger = logging.getLogger(__name__)

Scope = Literal["layer", "global"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(value: int | str) -> int:
    """Read a size: a number of bytes, or text such as "12GiB", "800 MB" or "1.5e9".

    Raises:
        ValueError: It is not such a text, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(value), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    try:
        size_bytes = round(float(match[1]) * unit) if match and unit else 0
    except ValueError:
        size_bytes = 0
    if size_bytes < 1:
        raise ValueError(
            f"{value!r} is no size: give a positive number of bytes, or one with a unit "
            "(B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)"
        )
    return size_bytes


def slots_per_layer(
    spec: MoESpec,
    *,
    slots: int | Sequence[int] | None = None,
    budget_bytes: int | str | None = None,
) -> tuple[int, ...]:
    """Slots of each MoE layer: as told, or as many as the budget pays for.

    Args:
        spec: The model.
        slots: C for every layer, or one number per layer.
        budget_bytes: Memory for all slots together, in any form that `parse_bytes` reads.

    Raises:
        ValueError: Both or neither are given; a layer would get fewer slots than one token needs
            or more than it has experts; the spec does not say what an expert weighs.
    """
    if (slots is None) == (budget_bytes is None):
        raise ValueError(
            f"slots={slots} and budget_bytes={budget_bytes}: give exactly one of them; "
            f"{spec.describe()} can have {spec.top_k}..{spec.num_experts} slots per layer"
        )
    if budget_bytes is not None:
        return (slots_for_bytes(parse_bytes(budget_bytes), spec),) * spec.num_layers
    given = (slots,) * spec.num_layers if isinstance(slots, int) else tuple(slots or ())
    if len(given) != spec.num_layers:
        raise ValueError(
            f"slots has {len(given)} entries: {spec.describe()} needs one number, or one per layer"
        )
    for layer, num_slots in enumerate(given):
        if not spec.top_k <= num_slots <= spec.num_experts:
            raise ValueError(
                f"slots={num_slots} for layer {layer}: must be in top_k={spec.top_k}.."
                f"num_experts={spec.num_experts}, so that one token's experts fit"
            )
    return given


def slots_for_bytes(budget_bytes: int, spec: MoESpec) -> int:
    """The most slots per layer, the same in all layers, that ``budget_bytes`` pays for.

    Raises:
        ValueError: The sizes are unknown, or one token's experts would not fit.
    """
    bytes_per_slot = working_set_bytes(spec, num_experts=1)
    num_slots = budget_bytes // bytes_per_slot
    if num_slots < spec.top_k:
        raise ValueError(
            f"budget_bytes={budget_bytes} pays for {num_slots} slots per layer, but one token "
            f"needs top_k={spec.top_k}: the smallest budget that works for {spec.describe()} is "
            f"{spec.top_k * bytes_per_slot} bytes"
        )
    if num_slots > spec.num_experts:
        logger.info("The budget of %d bytes holds every expert", budget_bytes)
    return min(num_slots, spec.num_experts)


def bytes_for_slots(slots: int, spec: MoESpec) -> int | None:
    """Bytes of ``slots`` experts in every layer; None if the spec does not know their sizes."""
    if spec.expert_bytes_per_layer is None:
        return None
    return slots * sum(spec.expert_bytes_per_layer)


def working_set_bytes(spec: MoESpec, *, num_experts: int | None = None) -> int:
    """What one token touches: its K experts (or ``num_experts`` of them) in every layer.

    A pool with a global LRU that is smaller hits nothing in decode: each expert is evicted before
    the layer comes round again (the LRU floor).

    Raises:
        ValueError: The sizes are unknown.
    """
    if spec.expert_bytes_per_layer is None:
        raise ValueError(
            f"budget_bytes: the spec of {spec.describe()} does not say what an expert weighs; "
            "give slots instead"
        )
    count = spec.top_k if num_experts is None else num_experts
    return count * sum(spec.expert_bytes_per_layer)


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
        slots_per_layer(spec, slots=count)
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
            "a global LRU hits nothing in decode",
            budget_bytes,
            floor_bytes,
        )


def slots_at(residency: float, spec: MoESpec) -> int:
    """Slots per layer that hold the share ``residency`` of the experts, at least K of them.

    Raises:
        ValueError: ``residency`` is not in (0, 1].
    """
    if not 0.0 < residency <= 1.0:
        raise ValueError(f"residency={residency}: must be a share in (0, 1]")
    return max(spec.top_k, round(residency * spec.num_experts))


def parse_budget(text: str, spec: MoESpec) -> tuple[int, ...]:
    """Slots of each MoE layer for a share of the experts, ``"25%"``, or for memory, ``"12GiB"``.

    Raises:
        ValueError: It is neither, or too small.
    """
    share = text.strip().removesuffix("%")
    if share == text.strip():
        return slots_per_layer(spec, budget_bytes=text)
    try:
        residency = float(share) / 100
    except ValueError:
        raise ValueError(f"budget={text!r}: a share is written as in 25%") from None
    return slots_per_layer(spec, slots=slots_at(residency, spec))
