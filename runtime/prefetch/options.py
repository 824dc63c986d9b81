"""What may be set about prefetching, and the two numbers that follow: how much, and how sure.

Shape letters: F expert FFN inner size.
"""

from dataclasses import dataclass
from typing import Literal

from runtime.device_cache import CHUNK_NEURONS

SIDE_PRIORITY = -1
"""Of the stream beside the main one, by CUDA's numbers: else what is small waits until all programs
of the experts have begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefetchOptions:
    """How prefetches are made; the defaults suit a fast GPU.

    Args:
        into: ``landing`` displaces nothing: a buffer beside the slots takes what the next layers
            are expected to need (`runtime.prefetch.landing`). ``slots`` makes room by the policy's
            scores, which can pay where windows bring whole experts. ``beside`` is MoEpic's buffer
            for the next layer (`runtime.prefetch.speculative`), the only one that works with slots
            of tops.
        layers_ahead: How many layers after the one that has computed may be fetched for into slots;
            the nearest takes what it can use of the allowance, and leaves the others the rest.
        landing_layers: How many layers ahead is looked for what lands, the likeliest of all.
        max_fetches: The most experts of a layer in one prefetch into slots.
        landing_records: The most experts that land, and the buffer's size in experts.
        margin: By how much a forecast must exceed that of what it displaces, in [0, 1).
        displaced_use: How likely a displaced expert would have been used before it would have gone
            anyway, in [0, 1]; see `least_probability`.
        programs_per_record: Of a copy; fewer leave attention more of the GPU.
        window_s: Seconds in which the link is idle between two layers, until they are measured.
        link_bytes_per_s: Rate of copies, until it is measured in place; None measures one first.
        share: Of the window that copies may fill, in (0, 1].
        review_tokens: Passes between two looks at the counters.
        launch_s: Seconds of the step that a layer's prefetch takes, whatever comes of it.
        waste_cost: What a neuron costs that came for nothing over an idle link, relative to one
            that is missed, at least 0.

    Raises:
        ValueError: A number is out of range.
    """

    into: Literal["landing", "slots", "beside"] = "landing"
    layers_ahead: int = 2
    landing_layers: int = 12
    max_fetches: int = 4
    landing_records: int = 3
    margin: float = 0.1
    displaced_use: float = 0.15
    programs_per_record: int = 24
    window_s: float = 150e-6
    link_bytes_per_s: float | None = None
    share: float = 0.9
    review_tokens: int = 64
    launch_s: float = 4e-6
    waste_cost: float = 0.1

    def __post_init__(self) -> None:
        """Check every field."""
        if self.into not in ("landing", "slots", "beside"):
            raise ValueError(f"into={self.into}: must be landing, slots or beside")
        for name in (
            *("layers_ahead", "landing_layers", "max_fetches", "landing_records"),
            *("programs_per_record", "review_tokens"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        ranges = {
            "margin": 0 <= self.margin < 1,
            "displaced_use": 0 <= self.displaced_use <= 1,
            "window_s": self.window_s >= 0,
            "link_bytes_per_s": self.link_bytes_per_s is None or self.link_bytes_per_s > 0,
            "share": 0 < self.share <= 1,
            "launch_s": self.launch_s >= 0,
            "waste_cost": self.waste_cost >= 0,
        }
        for name, holds in ranges.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: out of range")


def allowance_neurons(*, window_s: float, neurons_per_s: float, share: float) -> int:
    """How many neurons can travel in a window, in whole chunks."""
    return int(window_s * neurons_per_s * share) // CHUNK_NEURONS * CHUNK_NEURONS


def least_to_land(waste_cost: float) -> float:
    """From which probability p on landing saves more than it costs: p = (1 - p) * waste_cost."""
    return waste_cost / (1 + waste_cost)


def least_probability(*, allowance: int, num_neurons: int, displaced_use: float) -> float:
    """From which probability p on a prefetch saves more than it costs.

    A window brings a share a = allowance / F of an expert, at most all of it, and saves p * a
    experts on the link. If it is not used, the expert that it displaced may have to be fetched
    anew: (1 - p) * u, where u is `PrefetchOptions.displaced_use`. (If it is used, that one would
    have had to go for it anyway.) Both are equal at p = u / (a + u).

    Args:
        allowance: Neurons of one window.
        num_neurons: F.
        displaced_use: u.

    Returns:
        In [0, 1]; infinite where nothing can come.
    """
    if not allowance:
        return float("inf")
    part = min(1.0, allowance / num_neurons)
    return displaced_use / (part + displaced_use)
