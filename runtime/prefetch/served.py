"""Whether a served model prefetches, by whose forecasts, and the memory that it takes.

Knows what `runtime.engine.attach` is told; how anything is fetched is the other modules' matter.

Shape letters: L MoE layers · E experts per layer.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from data.adapters import MoELayer
from data.schema import MoESpec
from predictors.base import Predictor
from runtime.expert_layout import ExpertLayout
from runtime.graph_forecasts import device_bytes
from runtime.policies.base import Policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.sources import TokenForecast

Prefetch = bool | Literal["auto"]


def source_for(
    prefetch: Prefetch,
    policy: Policy,
    predictor: Predictor | None,
    spec: MoESpec,
    device: torch.device,
) -> TokenForecast | None:
    """Who says what the next layers will need; None where nothing is to be prefetched.

    Args:
        prefetch: As `attach` has it.
        policy: What is kept; if it reads no forecasts, no predictor runs.
        predictor: Whose forecasts they would be.
        spec: Of the model.
        device: Where the model is served, and forecasts are to lie.

    Raises:
        ValueError: ``prefetch`` is none of its values, or asks for what cannot be.
    """
    if prefetch not in (False, True, "auto"):
        raise ValueError(f"prefetch={prefetch!r}: must be one of False, True, 'auto'")
    if prefetch is False:
        return None
    reason = None
    if device.type == "cpu":
        reason = "only a GPU does it"
    elif policy.foresight != "forecast":
        reason = f"policy {policy.name!r} reads no forecasts"
    elif predictor is None or not device_bytes(predictor):
        kind = None if predictor is None else predictor.kind
        reason = f"predictor {kind!r} does not run inside the graph"
    if reason is None:
        with torch.inference_mode(False):  # whose tensors could be changed nowhere else
            next_LE = torch.zeros(spec.num_layers, spec.num_experts, device=device)
        # A step's id is known within the graph when layer 0 has routed, as `GraphForecasts` has it.
        return TokenForecast(next_LE, known_from=0)
    if prefetch is True:
        raise ValueError(f"prefetch=True: {reason}; leave it out")
    return None


def prefetch_bytes(layers: Sequence[MoELayer], predictor: Predictor | None) -> int:
    """What the buffer of prefetched experts takes on the device, and what says which they are."""
    records = min(PrefetchOptions().landing_records, layers[0].num_experts)
    learned = None if predictor is None else predictor.next_layers
    held = () if learned is None else learned.buffers()
    return records * ExpertLayout.of(layers[0].experts).record_bytes + sum(
        tensor.numel() * tensor.element_size() for tensor in held
    )
