"""What decoding should cost at a hit ratio: bytes, seconds and tokens per second, by arithmetic.

Knows nothing of memory, traces or how rates were measured.

Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

from dataclasses import dataclass

import numpy as np

from runtime.footprint import Footprint
from runtime.link import LinkRates

# LFRU's hit ratio by residency, replayed over 6,000 tokens each: decode of gpt-oss-20b, and
# DeepSeek-V2-Lite on ESFT's prompts token by token. Models and texts lie between and around them.
_RESIDENCIES = (0.0, 0.125, 0.25, 0.406, 0.5, 0.75, 0.906, 1.0)
_HIGH = (0.0, 0.442, 0.680, 0.845, 0.903, 0.979, 0.996, 1.0)
_LOW = (0.0, 0.347, 0.552, 0.708, 0.778, 0.920, 0.982, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What is expected of decoding.

    Attributes:
        hit_ratio: Of accesses.
        miss_bytes_per_token: What crosses the link for each token of each request.
        link_s: Seconds of a step's transfers; None where no rate is known.
        compute_s: Seconds of a step's compute; None where not known.
        bound_tokens_per_s: Of all requests together, if link and compute overlap wholly.
        serial_tokens_per_s: If not at all.
    """

    hit_ratio: float
    miss_bytes_per_token: float
    link_s: float | None
    compute_s: float | None
    bound_tokens_per_s: float | None
    serial_tokens_per_s: float | None


def rough_hit_ratio(residency: float) -> tuple[float, float]:
    """LFRU's hit ratio on an unknown model, from low to high: between two recorded ones."""
    low, high = (float(np.interp(residency, _RESIDENCIES, curve)) for curve in (_LOW, _HIGH))
    return low, high


def needed_experts(model: Footprint) -> float:
    """Distinct experts that a step of all requests needs in a layer, if they choose independently.

    More than real requests need, which share favourites.
    """
    spec = model.spec
    return spec.num_experts * (1 - (1 - spec.top_k / spec.num_experts) ** model.batch)


def expected_speed(
    model: Footprint, hit_ratio: float, *, link: LinkRates | None, compute_s: float | None
) -> Speed:
    """Bytes and seconds of a decode step.

    Args:
        model: What is served, and how many requests at once.
        hit_ratio: Of accesses.
        link: What copies cost; None gives no speed.
        compute_s: Of a step with everything resident; None counts as nothing.
    """
    misses = model.spec.num_layers * needed_experts(model) * (1 - hit_ratio)
    miss_bytes = misses * model.layout.record_bytes
    link_s = bound = serial = None
    if link is not None:
        link_s = misses * link.latency_s + miss_bytes / link.bytes_per_s
        # All resident and no compute time known: nothing bounds the speed.
        if longest := max(link_s, compute_s or 0.0):
            bound = model.batch / longest
            serial = model.batch / (link_s + (compute_s or 0.0))
    return Speed(
        hit_ratio=hit_ratio,
        miss_bytes_per_token=miss_bytes / model.batch,
        link_s=link_s,
        compute_s=compute_s,
        bound_tokens_per_s=bound,
        serial_tokens_per_s=serial,
    )


def resident_step_s(model: Footprint, device_bytes_per_s: float) -> float:
    """Seconds to read what a step with everything resident reads: a bound of the memory's rate."""
    experts_bytes = model.spec.num_layers * needed_experts(model) * model.layout.record_bytes
    step_bytes = model.token_weight_bytes + model.kv_bytes + experts_bytes
    return step_bytes / device_bytes_per_s
