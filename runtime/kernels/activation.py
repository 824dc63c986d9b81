"""What an expert does between its up and its down projection, as kernels know it.

An experts module of transformers may bring its own gate (gpt-oss clamps, adds one and mixes in its
own way), so nothing is read off its class name: a form is taken only if it gives the module's own
numbers.

Shape letters: N numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.adapters import MoELayer
from runtime.expert_layout import ExpertLayout

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "clamped")
"""Applied to the gate and multiplied by up; where experts have no gate, applied to up."""

_PROBE = 97  # numbers that a form is compared on at each of these reaches
_REACHES = (4.0, 12.0, 50.0, 1000.0)  # a clamp looks like none to numbers within it


@dataclass(frozen=True, slots=True)
class Activation:
    """One of `KINDS`.

    Args:
        kind: ``clamped`` is gpt-oss's ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped.
        alpha: Of ``clamped``.
        limit: Of ``clamped``: gate at most that, up within it on both sides.
    """

    kind: str
    alpha: float = 0.0
    limit: float = 0.0

    @classmethod
    def of(cls, experts: Any) -> "Activation":
        """The form that a module's experts compute.

        Raises:
            ValueError: None of `KINDS` gives the module's numbers.
        """
        candidates = [cls(kind) for kind in KINDS[:-1]]
        if hasattr(experts, "alpha") and hasattr(experts, "limit"):
            candidates.insert(0, cls("clamped", float(experts.alpha), float(experts.limit)))
        unit_N = torch.linspace(-1, 1, _PROBE)
        gate_N = torch.cat([reach * unit_N for reach in _REACHES])
        up_N = torch.cat([-0.9 * reach * unit_N.roll(13) for reach in _REACHES])
        theirs_N = _of_module(experts, gate_N, up_N)
        for candidate in candidates:
            if torch.allclose(candidate(gate_N, up_N, bool(experts.has_gate)), theirs_N, atol=1e-4):
                return candidate
        raise ValueError(
            f"the activation of {type(experts).__name__} is none of {', '.join(KINDS)}: "
            "its experts cannot be computed by the kernels"
        )

    def __call__(self, gate: Tensor, up: Tensor, has_gate: bool) -> Tensor:
        """The reference: of equal shapes, any dtype."""
        if self.kind == "clamped":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        tanh = {"approximate": "tanh"} if self.kind == "gelu_tanh" else {}
        function = getattr(F, self.kind.removesuffix("_tanh"))
        activated: Tensor = function(gate if has_gate else up, **tanh)
        return activated * up if has_gate else activated


def _of_module(experts: Any, gate_N: Tensor, up_N: Tensor) -> Tensor:
    """The same by the module, which may live anywhere and in any dtype."""
    parameters = [p for p in experts.parameters() if p.device.type != "meta"]
    where = parameters[0] if parameters and isinstance(experts, nn.Module) else gate_N
    gate_N, up_N = (x.to(where.device, torch.float32) for x in (gate_N, up_N))
    if not experts.has_gate:
        return experts.act_fn(up_N).cpu()  # type: ignore[no-any-return]
    if experts.is_concatenated:
        joined = torch.cat([gate_N, up_N])
    else:
        joined = torch.stack([gate_N, up_N], -1).flatten()
    return experts._apply_gate(joined[None])[0].float().cpu()  # type: ignore[no-any-return]


def activations_of(layers: Sequence[MoELayer]) -> list[Activation]:
    """The activation of each layer's experts.

    Raises:
        ValueError: The kernels cannot compute these experts, or not in this dtype.
    """
    activations = []
    for moe in layers:
        experts: Any = moe.experts
        ExpertLayout.of(experts)
        if getattr(experts, "has_post_expert_norm", False):
            raise ValueError(
                f"{type(experts).__name__} normalises what each expert says: its experts cannot be "
                "computed by the kernels"
            )
        activations.append(Activation.of(experts))
    return activations
