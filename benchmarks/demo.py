"""What train.py costs and shows: twice from nothing, the second time with everything done.

    python -m benchmarks.demo out=benchmarks/results/demo.json
    python -m benchmarks.demo overrides=[experiment=gptoss20b] out=benchmarks/results/gptoss20b.json

The first is a newcomer's first command, on the embedded model; the second judges the same predictor
on routing recorded from a real one. Kept is the evaluation that train.py prints as a table.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, record
from data.cli import parse_cli


def train(outputs: Path, overrides: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Seconds and summary of one run."""
    start_s = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides, f"paths.root={outputs}"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return time.perf_counter() - start_s, json.loads(result.stdout.splitlines()[-1])


@dataclass
class Args:
    """Run train.py twice from nothing; out=PATH keeps what was measured."""

    overrides: list[str] = field(default_factory=lambda: ["predictor=semantic"])
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    """Measure, print the JSON line."""
    args = parse_cli(Args, argv)
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "outputs"
        first_s, summary = train(outputs, args.overrides)
        second_s, _ = train(outputs, args.overrides)
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
