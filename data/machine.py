"""Where and with what something was measured: processor, memory, GPU, versions, commit.

Knows nothing of what was measured. Every value is plain and informative; none is ever compared.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "datasets", "sentence-transformers")


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and the GPUs that torch sees."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append({"name": gpu.name, "memory_bytes": gpu.total_memory})
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
    }


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's and the packages'; "absent" where one is not installed."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def commit() -> str:
    """The project's commit, and whether files have been changed since; "" outside of git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
