"""Copies by GPU threads: many contiguous pieces of memory in one launch, inside a graph or out.

Either side may be pinned host memory. Several programs share a piece, each with one contiguous
range of it, since the link wants long runs; loads are plain ones, which reach twice the rate of
those that bypass the first cache.

Shape letters: N pieces.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Words of 8 bytes that a program moves at once."""


@triton.jit
def copy_range(source, target, num_bytes, BLOCK: tl.constexpr):
    """This program's share, along axis 0 of the grid, of a copy between two addresses."""
    num_words = num_bytes // 8
    per_program = tl.cdiv(tl.cdiv(num_words, tl.num_programs(0)), 2) * 2  # 16 bytes
    first = tl.multiple_of(tl.program_id(0) * per_program, 2)
    last = tl.multiple_of(tl.minimum(first + per_program, num_words), 2)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        # Addresses that come from memory need to be told that they are aligned.
        read = source.to(tl.pointer_type(tl.int64)) + at
        write = target.to(tl.pointer_type(tl.int64)) + at
        read = tl.max_contiguous(tl.multiple_of(read, 16), BLOCK)
        write = tl.max_contiguous(tl.multiple_of(write, 16), BLOCK)
        tl.store(write, tl.load(read, mask=at < last), mask=at < last)


@triton.jit
def _copy(source_N, target_N, num_bytes_N, BLOCK: tl.constexpr):
    piece = tl.program_id(1)
    num_bytes = tl.load(num_bytes_N + piece)
    if num_bytes > 0:
        copy_range(tl.load(source_N + piece), tl.load(target_N + piece), num_bytes, BLOCK)


def copy_records(
    source_address_N: Tensor,
    target_address_N: Tensor,
    num_bytes_N: Tensor,
    *,
    programs_per_record: int = 24,
    num_warps: int = 8,
) -> None:
    """Copy each piece.

    Args:
        source_address_N: int64, multiples of 16.
        target_address_N: int64, likewise; pieces must not overlap.
        num_bytes_N: int64, multiples of 16; a piece of none costs nothing.
        programs_per_record: 16 and more reach the link's full rate with one piece at a time.
        num_warps: Of a program; half of them hold as many bytes on their way, in more registers.
    """
    _copy[(programs_per_record, len(num_bytes_N))](
        source_address_N, target_address_N, num_bytes_N, BLOCK=BLOCK, num_warps=num_warps
    )
