"""How fast experts cross the link, measured here and now, in about a second.

What is measured on a CUDA device: the copy engine from pinned and from pageable memory, by size;
copies by threads of the GPU from pinned memory; the rate of the GPU's own memory. `fit_link` makes
of the first the two numbers that plans reckon with: seconds of one copy = latency + bytes / rate.

On a machine without a GPU nothing is measured: `measure_link` returns None, and callers say so or
take rates that they are given. Knows nothing of caches, budgets or forward passes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

SIZES_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26)  # 64 KiB .. 64 MiB
_COPIES = 8  # of one size, back to back, in one timing
_REPEATS = 3
_BUFFER_BYTES = 2**27


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRates:
    """What one host-to-device copy costs.

    Args:
        bytes_per_s: Rate of large copies.
        latency_s: Added to each copy.
        pinned: The host memory is page-locked; pageable memory goes through a bounce buffer.

    Raises:
        ValueError: A number is out of range.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    pinned: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s={self.bytes_per_s}: must be positive")
        if not self.latency_s >= 0:
            raise ValueError(f"latency_s={self.latency_s}: must not be negative")

    def copy_s(self, num_bytes: int, copies: int = 1) -> float:
        """Seconds for ``num_bytes`` in all, in so many copies one after the other."""
        return copies * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReport:
    """Everything that `measure_link` found.

    Attributes:
        engine: Rates of the copy engine from pinned memory.
        engine_bytes_per_s: Its rate at each size of `SIZES_BYTES`.
        pageable_bytes_per_s: The same from pageable memory.
        threads_bytes_per_s: Copies by GPU threads; None where the kernel is not to be had.
        device_bytes_per_s: The GPU's own memory, reading and writing counted.
        spent_s: How long measuring took.
    """

    engine: LinkRates
    engine_bytes_per_s: Mapping[int, float]
    pageable_bytes_per_s: Mapping[int, float]
    threads_bytes_per_s: float | None
    device_bytes_per_s: float
    spent_s: float


def fit_link(seconds_of: Mapping[int, float], *, pinned: bool = True) -> LinkRates:
    """Rate and latency from the seconds of one copy at two sizes or more.

    The slope between the two largest sizes is the rate, what the smallest takes beyond it the
    latency: a least-squares line would bend the rate towards sizes that no expert has.

    Args:
        seconds_of: Bytes of a copy -> its seconds.
        pinned: What memory was measured.

    Raises:
        ValueError: Fewer than two sizes.
    """
    if len(seconds_of) < 2:
        raise ValueError(f"seconds_of={dict(seconds_of)}: a rate needs at least two sizes")
    *_, second, largest = sorted(seconds_of)
    smallest = min(seconds_of)
    difference_s = seconds_of[largest] - seconds_of[second]
    rate = largest / seconds_of[largest]
    if difference_s > 0:  # noise can turn two close sizes around; then the plain rate stands
        # Never more than a tenth above the plain rate: noise makes slopes, too.
        rate = min((largest - second) / difference_s, 1.1 * rate)
    latency_s = max(0.0, seconds_of[smallest] - smallest / rate)
    return LinkRates(bytes_per_s=rate, latency_s=latency_s, pinned=pinned)


def measure_link(device: torch.device | str) -> LinkReport | None:
    """Measure the link to a CUDA device; None ("not measured") for a device without one."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    started_s = time.perf_counter()
    target = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.ones(_BUFFER_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    pinned_s = {size: _engine_copy_s(pinned, target, size) for size in SIZES_BYTES}
    pageable_s = {size: _engine_copy_s(pageable, target, size) for size in SIZES_BYTES}
    half = _BUFFER_BYTES // 2
    device_s = seconds_of(lambda: target[:half].copy_(target[half:]), device)
    return LinkReport(
        engine=fit_link(pinned_s),
        engine_bytes_per_s={size: size / spent for size, spent in pinned_s.items()},
        pageable_bytes_per_s={size: size / spent for size, spent in pageable_s.items()},
        threads_bytes_per_s=_threads_bytes_per_s(pinned, target),
        device_bytes_per_s=2 * half / device_s,
        spent_s=time.perf_counter() - started_s,
    )


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of ``run`` on an idle device."""
    return median(timings_s(run, device))


def timings_s(
    run: Callable[[], object], device: torch.device, *, repeats: int = _REPEATS
) -> list[float]:
    """Seconds of each ``run`` on an idle device, after one call that is not counted."""
    spent_s = []
    for repeat in range(repeats + 1):
        _wait(device)
        started_s = time.perf_counter()
        run()
        _wait(device)
        if repeat:
            spent_s.append(time.perf_counter() - started_s)
    return spent_s


def _engine_copy_s(source: Tensor, target: Tensor, size: int) -> float:
    """Seconds of one copy of ``size`` bytes among several that follow each other."""
    places = [(i * size) % (_BUFFER_BYTES - size + 1) for i in range(_COPIES)]

    def copies() -> None:
        for place in places:
            part = slice(place, place + size)
            target[part].copy_(source[part], non_blocking=True)

    return seconds_of(copies, target.device) / _COPIES


def _threads_bytes_per_s(pinned: Tensor, target: Tensor) -> float | None:
    try:
        from runtime.kernels.copy import copy_records
    except ImportError:  # a torch without Triton has no such kernel
        return None
    num_records, num_bytes = 8, _BUFFER_BYTES // 8

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(target.device)

    source_N = table([pinned.data_ptr() + i * num_bytes for i in range(num_records)])
    target_N = table([target.data_ptr() + i * num_bytes for i in range(num_records)])
    num_bytes_N = table([num_bytes] * num_records)
    spent_s = seconds_of(lambda: copy_records(source_N, target_N, num_bytes_N), target.device)
    return _BUFFER_BYTES / spent_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
