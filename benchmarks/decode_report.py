"""What the decode benchmark says of a row: times, bytes, and how near it comes to its bound.

    efficiency = max(resident step, needed bytes / measured rate of link and host) / measured step

Bytes are needed if they were missed, or prefetched and used: what came for nothing does not count.
What the link carried in all, per second of it, is its use. The host's rate counts in rows where it
computes a part of what is missing. A step that only
computes cannot be shorter than the fully resident one, and one that only fetches not shorter than
its bytes take; 1 is a perfect overlap of both. Knows no rows and times nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.decode_rows import Traffic
from benchmarks.record import spread
from data.tables import format_table


@dataclass
class Samples:
    """What was measured of one row.

    Attributes:
        step_s: A list of every token's seconds for each repeat.
        traffic: Of each repeat.
        peak_gpu_bytes: The most that was allocated while it decoded.
        exact: Whether the logits that were looked at (first, last, one between) were in every
            repeat, to the bit, those of the resident row with the same kernels; None where that is
            not to be expected.
        difference: Of the first token's logits, relative to our resident row's, as a ratio of
            norms; None where that is not to be expected to be small.
        finite: Whether all logits that were looked at were finite.
    """

    step_s: list[list[float]] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    peak_gpu_bytes: int = 0
    exact: bool | None = None
    difference: float | None = None
    finite: bool = True

    @property
    def mean_step_s(self) -> float:
        """Median over the repeats of the mean step."""
        return statistics.median(statistics.fmean(steps) for steps in self.step_s)


def summary(
    name: str,
    slots: int,
    samples: Samples,
    *,
    resident_step_s: float,
    link_bytes_per_s: float,
    cpu_bytes_per_s: float = 0.0,
) -> dict[str, Any]:
    """One row as plain values; per-token figures are means over all timed tokens.

    Args:
        name: The row's.
        slots: Per layer.
        samples: What was measured.
        resident_step_s: The fully resident step with our kernels in our graph, of the same run.
        link_bytes_per_s: The best rate that was measured for the link in the same run.
        cpu_bytes_per_s: Of the host, where it takes a part.
    """
    steps = sorted(step for repeat in samples.step_s for step in repeat)
    accesses, hits, missed, prefetched, wasted, on_cpu = (
        sum(getattr(traffic, key) for traffic in samples.traffic)
        for key in (
            "accesses",
            "hits",
            "missed_bytes",
            "prefetched_bytes",
            "wasted_bytes",
            "cpu_bytes",
        )
    )
    mean_step_s = samples.mean_step_s
    needed_per_token = (missed + prefetched - wasted) / len(steps)
    bound_s = max(resident_step_s, needed_per_token / (link_bytes_per_s + cpu_bytes_per_s))
    carried_per_token = (missed - on_cpu + prefetched) / len(steps)
    return {
        "row": name,
        "slots": slots,
        "tpot_p50_s": percentile(steps, 0.5),
        "tpot_p99_s": percentile(steps, 0.99),
        "tpot_mean_s": spread([statistics.fmean(repeat) for repeat in samples.step_s]),
        "tokens": len(steps),
        "resident_speed_fraction": resident_step_s / mean_step_s,
        "hit_ratio": hits / accesses,
        "missed_bytes_per_token": missed / len(steps),
        "prefetched_bytes_per_token": prefetched / len(steps),
        "wasted_bytes_per_token": wasted / len(steps),
        "cpu_bytes_per_token": on_cpu / len(steps),
        "cpu_bytes_per_s": cpu_bytes_per_s,
        "stall_s_per_token": max(0.0, mean_step_s - resident_step_s),
        "efficiency": bound_s / mean_step_s,
        "link_use": carried_per_token / link_bytes_per_s / mean_step_s,
        "peak_gpu_bytes": samples.peak_gpu_bytes,
        "exact": samples.exact,
        "logits_difference": samples.difference,
        "finite": samples.finite,
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the ascending values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


HEADER = (
    "row",
    "TPOT p50 ms",
    "p99 ms",
    "of resident speed",
    "hit ratio",
    "missed MB/token",
    "prefetched (wasted) MB/token",
    "stall ms",
    "efficiency",
    "link use",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, under `HEADER`."""
    mega = 1e-6
    return [
        row["row"],
        f"{1e3 * row['tpot_p50_s']:.2f}",
        f"{1e3 * row['tpot_p99_s']:.2f}",
        f"{row['resident_speed_fraction']:.2f}",
        f"{row['hit_ratio']:.3f}",
        f"{mega * row['missed_bytes_per_token']:.0f}",
        f"{mega * row['prefetched_bytes_per_token']:.0f} "
        f"({mega * row['wasted_bytes_per_token']:.0f})",
        f"{1e3 * row['stall_s_per_token']:.2f}",
        f"{row['efficiency']:.3f}",
        f"{row['link_use']:.2f}",
    ]


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    return format_table(HEADER, [cells(row) for row in rows])
