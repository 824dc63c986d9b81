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
    """How the work of several tokens is cut; the outcome may differ by rounding only.

    Args:
        neurons: Of one chunk: 16, 32 or 64.
        columns: Of D at a time, a power of two, at least 16.
        num_warps: Of a program.
        num_stages: Tiles of weights on their way at a time; memory is fast only if many are.
    """

    neurons: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Stream:
    """How the work of one token is cut; the outcome may differ by rounding only.

    Args:
        neurons: Of one chunk, a multiple of ``step``.
        step: Neurons at a time, a power of two up to 64.
        num_warps: Of a program.
    """

    neurons: int
    step: int
    num_warps: int


DEFAULT_TILES = Tiles(32, 64, 4, 3)
"""Near the best on an H100 from memory and over the link alike (benchmarks/expert_kernels.py)."""


def stream_for(layout: ExpertLayout) -> Stream:
    """How one token's work is cut by default; measured as `DEFAULT_TILES`.

    A step's weights wait in registers for the step before, so that wide rows allow few of them.
    """
    row = 1 << (layout.hidden_size - 1).bit_length()
    return Stream(24, max(1, min(8, 4096 // row)), 8)


def workspace_elements(
    *,
    num_tokens: int,
    top_k: int,
    layout: ExpertLayout,
    tiles: Tiles = DEFAULT_TILES,
    stream: Stream | None = None,
) -> int:
    """Elements of the float32 workspace that `expert_step` needs for so many tokens."""
    neurons = tiles.neurons if num_tokens > 1 else (stream or stream_for(layout)).neurons
    chunks = math.ceil(layout.expert_intermediate_size / neurons)
    return num_tokens * top_k * chunks * layout.hidden_size
