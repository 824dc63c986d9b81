"""How long a whole sweep of the simulator takes: every gpt-oss-20b token, 4 policies, 5 budgets.

    python -m benchmarks.simulate                        # the published table
    python -m benchmarks.simulate repeats=1 max_tokens=3000

Each repeat is a process of its own that runs the command a user would run, so that start, reading
and peak memory count. Ends with one line of JSON; ``out=PATH`` keeps it.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.cli import parse_cli
from data.files import write_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    """Time `python -m runtime.simulate` on a sweep of policies and budgets."""

    trace: str = "gptoss20b"
    policy: list[str] = field(default_factory=lambda: ["lru", "lfu", "lfru", "belady"])
    slots: list[int] = field(default_factory=lambda: [6, 8, 13, 16, 20])
    max_tokens: int | None = None
    threads: int = 2
    repeats: int = 5
    out: Path | None = None


def command_of(args: Args) -> list[str]:
    """The arguments that a user would give."""
    command = [f"trace={args.trace}", f"policy=[{','.join(args.policy)}]"]
    command.append(f"slots=[{','.join(map(str, args.slots))}]")
    return command + ([] if args.max_tokens is None else [f"max_tokens={args.max_tokens}"])


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_1_min": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit that is measured, marked if the tree differs from it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main(argv: list[str]) -> None:
    """Command line."""
    args = parse_cli(Args, argv)
    command = command_of(args)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    wall_s, cpu_s, answers = [], [], []
    before_machine = machine()
    for _ in tqdm(range(args.repeats), unit="run"):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "runtime.simulate", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall_s.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        answers.append(json.loads(result.stdout.splitlines()[-1])["results"])
    assert all(answer == answers[0] for answer in answers), "a replay must be deterministic"
    report = {
        "benchmark": "simulate",
        "command": f"python -m runtime.simulate {' '.join(command)}",
        "repeats": args.repeats,
        "threads": args.threads,
        "commit": commit(),
        "machine": before_machine,
        "wall_s": spread(wall_s),
        "cpu_s": spread(cpu_s),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "accesses": answers[0][0]["accesses"],
        "results": [
            {key: result[key] for key in ("policy", "slots", "hit_ratio", "gap_closed")}
            for result in answers[0]
        ],
    }
    for result in report["results"]:
        print(f"{result['policy']:>8} {result['slots']:>4} {100 * result['hit_ratio']:7.2f} %")
    print(f"wall {report['wall_s']}, cpu {report['cpu_s']}")
    print(f"peak {report['peak_rss_bytes'] / 2**20:.0f} MiB")
    if args.out is not None:
        write_json(args.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
