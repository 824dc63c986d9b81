"""What a newcomer's first command costs and shows: train.py twice from nothing.

    python -m benchmarks.demo out=benchmarks/results/demo.json

Runs `python train.py predictor=semantic` in an empty folder, then again with everything done, and
keeps the evaluation that it printed as a table.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, record
from data.cli import parse_cli


def train(outputs: Path) -> tuple[float, dict[str, Any]]:
    """Seconds and summary of one run."""
    start_s = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "predictor=semantic", f"paths.root={outputs}"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return time.perf_counter() - start_s, json.loads(result.stdout.splitlines()[-1])


@dataclass
class Args:
    """Run train.py twice from nothing; out=PATH keeps what was measured."""

    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print the JSON line."""
    args = parse_cli(Args, argv)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "outputs"
        first_s, summary = train(outputs)
        second_s, _ = train(outputs)
        (file,) = outputs.glob("evaluations/*/evaluation.json")
        evaluation = json.loads(file.read_text())
    record(
        "demo",
        {
            "first_s": first_s,
            "second_s": second_s,
            "stages_s": summary["seconds"],
            "evaluation": evaluation,
        },
        out=args.out,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
