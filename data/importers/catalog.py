"""The real data that the project knows by name, in the folder that MOECAST_DATA points at.

Knows where files lie, not what is in them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

TRACES: Mapping[str, tuple[str, ...]] = {
    "gptoss20b": ("gptoss20b/gptoss20b_ship.npz",),
    "esft": ("esft_dsv2lite/esft_intent.npz", "esft_dsv2lite/esft_law.npz"),
    "esft_intent": ("esft_dsv2lite/esft_intent.npz",),
    "esft_law": ("esft_dsv2lite/esft_law.npz",),
    "qwen": ("bigmoe_routes/qwen.route.csv.gz",),
    "gemma": ("bigmoe_routes/gemma.route.csv.gz",),
    "gptoss120b": ("bigmoe_routes/gptoss.route.csv.gz",),
    "moelens": ("moelens_small/deepseek_moe_16b_and_jetmoe_8b_full_probs.jsonl",),
}


def data_dir() -> Path:
    """The folder of real data: MOECAST_DATA, or ``shared/data`` beside the project.

    Raises:
        ValueError: There is no such folder.
    """
    beside_project = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("MOECAST_DATA", beside_project))
    if not folder.is_dir():
        raise ValueError(
            f"the folder of real data {folder} does not exist: set MOECAST_DATA to it, "
            "or name a trace by its path"
        )
    return folder


def trace_files(name: str) -> tuple[Path, ...]:
    """The files of one of `TRACES`; ValueError if the folder lacks one."""
    files = tuple(data_dir() / "traces" / file for file in TRACES[name])
    for file in files:
        if not file.exists():
            raise ValueError(f"trace {name!r} should be in {file}, which does not exist")
    return files
