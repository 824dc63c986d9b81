"""How the expert kernels cut their work, and the memory that takes: sizes, without Triton.

Whoever plans memory reads them where no kernel can run.

Shape letters: T tokens · K experts per token · D hidden · F expert FFN inner size.
"""

import math
from dataclasses import dataclass

from runtime.expert_layout import ExpertLayout

MAX_TOKENS = 32
"""The most tokens of one step; more are a prompt."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut; the outcome may differ by rounding only.

    Args:
        neurons: Of one chunk: 16, 32 or 64.
        columns: Of D at a time, a power of two, at least 16.
        num_warps: Of a program.
    """

    neurons: int
    columns: int
    num_warps: int


DEFAULT_TILES = Tiles(32, 64, 4)
"""Near the best on an H100 from memory and over the link alike (benchmarks/expert_kernels.py)."""


def workspace_elements(
    *, num_tokens: int, top_k: int, layout: ExpertLayout, tiles: Tiles = DEFAULT_TILES
) -> int:
    """Elements of the float32 workspace that `expert_step` needs for so many tokens."""
    chunks = math.ceil(layout.expert_intermediate_size / tiles.neurons)
    return num_tokens * top_k * chunks * layout.hidden_size
