"""What every benchmark says of itself: where, with what and of which commit it was measured."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "datasets", "sentence-transformers")


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
        "commit": _commit(),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_1_min": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
    }


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements, and how many there are."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
