"""Freed memory is used again while a fit runs, and given back after it."""

import platform
import resource

import pytest
import torch

from predictors.fit.allocator import freed_memory_kept

_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries differ")


def _faults(num_times: int) -> int:
    """Pages that the system had to provide for so many tensors of 40 MB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_times):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@_glibc
def test_inside_a_second_tensor_needs_no_new_pages_and_outside_it_does() -> None:
    with freed_memory_kept():
        kept = min(_faults(10) for _ in range(5))  # the heap needs a few to settle
    given_back = _faults(10)
    assert kept * 10 < given_back


@_glibc
def test_an_exception_ends_it_too() -> None:
    def fail() -> None:
        with freed_memory_kept():
            _faults(20)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    _faults(2)
    assert _faults(10) > 10
