"""What every benchmark says of itself: where, with what and of which commit it was measured."""

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_json
from data.machine import commit, cpu_name, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def record(name: str, values: Mapping[str, Any], *, out: Path | None) -> None:
    """Print what was measured and under which circumstances as one line of JSON.

    Args:
        name: The benchmark's.
        values: Plain values.
        out: Also write it here. Published results lie in `RESULTS`, as ``<name>.json``.
    """
    result = {**values, "benchmark": name, "circumstances": circumstances()}
    if out is not None:
        write_json(out, result)
    print(json.dumps(result))


def circumstances() -> dict[str, Any]:
    """Hardware, versions, commit and command."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {module.name}" if module else f"python {Path(sys.argv[0]).name}"
    return {
        # Without where the result was kept: that is not part of what was measured.
        "command": " ".join([program, *(a for a in sys.argv[1:] if not a.startswith("out="))]),
        "commit": commit(),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_1_min": os.getloadavg()[0],
        "versions": versions(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements, and how many there are."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }
