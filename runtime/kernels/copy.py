"""Copies by GPU threads: many contiguous pieces of memory in one launch, inside a graph or out.

Either side may be pinned host memory. Several programs share a piece, each with one contiguous
range of it, since the link wants long runs; loads are plain ones, which reach twice the rate of
those that bypass the first cache.

Shape letters: N pieces.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # words of 8 bytes that a program moves at once


@triton.jit
def _copy(source_N, target_N, num_bytes_N, BLOCK: tl.constexpr):
    piece = tl.program_id(1)
    num_words = tl.load(num_bytes_N + piece) // 8
    if num_words > 0:
        source = tl.load(source_N + piece).to(tl.pointer_type(tl.int64))
        target = tl.load(target_N + piece).to(tl.pointer_type(tl.int64))
        per_program = tl.cdiv(tl.cdiv(num_words, tl.num_programs(0)), 2) * 2  # 16 bytes
        first = tl.multiple_of(tl.program_id(0) * per_program, 2)
        last = tl.multiple_of(tl.minimum(first + per_program, num_words), 2)
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            # Addresses that come from memory need to be told that they are aligned.
            read = tl.max_contiguous(tl.multiple_of(source + at, 16), BLOCK)
            write = tl.max_contiguous(tl.multiple_of(target + at, 16), BLOCK)
            tl.store(write, tl.load(read, mask=at < last), mask=at < last)


def copy_records(
    source_address_N: Tensor,
    target_address_N: Tensor,
    num_bytes_N: Tensor,
    *,
    programs_per_record: int = 24,
) -> None:
    """Copy each piece.

    Args:
        source_address_N: int64, multiples of 16.
        target_address_N: int64, likewise; pieces must not overlap.
        num_bytes_N: int64, multiples of 16; a piece of none costs nothing.
        programs_per_record: 16 and more reach the link's full rate with one piece at a time.
    """
    _copy[(programs_per_record, len(num_bytes_N))](
        source_address_N, target_address_N, num_bytes_N, BLOCK=_BLOCK, num_warps=8
    )
