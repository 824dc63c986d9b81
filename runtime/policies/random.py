"""Random eviction: the floor that a policy must beat to be worth its state."""

import torch
from torch import Tensor

from runtime.policies.base import Policy, Usage, UsageField

# Odd 64-bit multipliers of splitmix64, as signed integers: products wrap around, on every device.
_STEP, _EXPERT = -7046029254386353131, -4658895280553007687
_MIX = -7723592293110705685
_MASK_32, _MASK_24 = (1 << 32) - 1, (1 << 24) - 1


class Random(Policy):
    """Evict any expert, all alike: the RND of MoEpic's Table 1.

    Scores are a hash of seed, step and expert id, drawn anew at each step: a replay is reproducible
    and a captured graph needs no generator. The layers of a model draw alike, since a policy is not
    told which layer it scores; each is uniform, but they are not independent of each other.

    Args:
        seed: Another seed gives other draws; not negative.
    """

    name = "random"
    uses: frozenset[UsageField] = frozenset()

    def __init__(self, *, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed}: must not be negative")
        self._offset = seed % (1 << 31)

    def keep_scores(self, usage: Usage, forecast_LE: Tensor | None) -> Tensor:
        """Uniform over the 2**24 multiples of 2**-24 in [0, 1)."""
        step_L1 = usage.step_L1
        ids_E = torch.arange(usage.resident_LE.shape[-1], device=step_L1.device)
        bits_LE = (step_L1 + (self._offset << 32)) * _STEP + ids_E * _EXPERT
        for _ in range(2):
            # >> keeps the sign of an int64: the mask makes it the shift of an unsigned number.
            bits_LE = (bits_LE ^ ((bits_LE >> 32) & _MASK_32)) * _MIX
        return ((bits_LE >> 40) & _MASK_24).float() * 2.0**-24
