"""What prefetching at a budget would move, and how much of it for nothing; from traces alone.

The n experts of every layer that `Forecast.next_LE` ranks highest are fetched ahead of each token:
issued. Those that the token then uses are used; the others wasted; coverage is used / needed. Each
token fetches anew, whatever a cache may still hold: an upper bound of what is moved. Nothing is
fetched for a token that no forecast was made for, and its experts count as not covered.

Shape letters: L MoE layers · E experts per layer · K experts per token.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.schema import MoESpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """What prefetching at one budget would move; the module docstring has the definitions.

    Attributes:
        experts_per_layer: n, fetched for each token in each layer.
        issued: Experts fetched, over all tokens and layers.
        used: Those of them that the token then used.
        coverage: Used / experts that the judged tokens used.
        issued_bytes_per_token: Over all judged tokens; None where the experts' sizes are not known.
        wasted_bytes_per_token: The part of them that was not used.
    """

    experts_per_layer: int
    issued: int
    used: int
    coverage: float
    issued_bytes_per_token: float | None
    wasted_bytes_per_token: float | None

    @classmethod
    def of(
        cls,
        spec: MoESpec,
        *,
        experts_per_layer: int,
        used_L: npt.NDArray[np.int64],
        num_tokens: int,
        num_tokens_without_forecast: int,
    ) -> "Prefetch":
        """From counts: ``used_L``, int64, of the experts fetched in each layer, those used."""
        num_issuing = num_tokens - num_tokens_without_forecast
        issued_L = np.full(spec.num_layers, num_issuing * experts_per_layer, np.int64)
        issued_bytes = wasted_bytes = None
        if spec.expert_bytes_per_layer is not None:
            bytes_L = np.array(spec.expert_bytes_per_layer)
            issued_bytes = float(issued_L @ bytes_L / num_tokens)
            wasted_bytes = float((issued_L - used_L) @ bytes_L / num_tokens)
        return cls(
            experts_per_layer=experts_per_layer,
            issued=int(issued_L.sum()),
            used=int(used_L.sum()),
            coverage=float(used_L.sum() / (num_tokens * spec.num_layers * spec.top_k)),
            issued_bytes_per_token=issued_bytes,
            wasted_bytes_per_token=wasted_bytes,
        )

    @property
    def wasted(self) -> int:
        """Experts fetched and not used."""
        return self.issued - self.used


def sized_spec(spec: MoESpec, other: MoESpec) -> MoESpec:
    """The one of two matching specs that knows the experts' sizes; the first if both or neither."""
    return other if spec.expert_bytes_per_layer is None and other.expert_bytes_per_layer else spec


def experts_per_layer_of(
    spec: MoESpec, *, experts: int | None = None, bytes_per_token: int | None = None
) -> int:
    """A prefetch budget as the n of `Prefetch`: K unless told otherwise.

    Args:
        spec: The model's MoE.
        experts: n itself, 1..min(3K, E).
        bytes_per_token: Instead: what may be moved for one token, of all layers together.

    Raises:
        ValueError: Both are given, or one is out of range or cannot be told.
    """
    most = min(3 * spec.top_k, spec.num_experts)
    if experts is not None and bytes_per_token is not None:
        raise ValueError("give the prefetch budget in experts or in bytes, not both")
    if bytes_per_token is not None:
        if spec.expert_bytes_per_layer is None:
            raise ValueError(
                f"a prefetch budget in bytes needs the experts' sizes, and the traces of "
                f"{spec.describe()} do not say them: give it in experts"
            )
        per_expert = sum(spec.expert_bytes_per_layer)
        if bytes_per_token < per_expert:
            raise ValueError(
                f"a prefetch budget of {bytes_per_token} bytes a token is less than one expert in "
                f"each layer, {per_expert}"
            )
        return min(most, bytes_per_token // per_expert)
    if experts is None:
        return spec.top_k
    if not 1 <= experts <= most:
        raise ValueError(f"a prefetch budget of {experts} experts a layer: must be in 1..{most}")
    return experts
