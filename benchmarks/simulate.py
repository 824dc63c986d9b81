"""How long a whole sweep of the simulator takes: every gpt-oss-20b token, 4 policies, 5 budgets.

    python -m benchmarks.simulate                        # the published table
    python -m benchmarks.simulate repeats=1 max_tokens=3000

Each repeat is a process of its own that runs the command a user would run, so that start, reading
and peak memory count. Ends with one line of JSON, which ``out=benchmarks/results/simulate.json``
keeps.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import ROOT, record, spread
from data.cli import parse_cli


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


def main(argv: list[str]) -> None:
    """Command line."""
    args = parse_cli(Args, argv)
    command = command_of(args)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    wall_s, cpu_s, answers = [], [], []
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
    report: dict[str, Any] = {
        "measured": f"python -m runtime.simulate {' '.join(command)}",
        "repeats": args.repeats,
        "threads": args.threads,
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
    record("simulate", report, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
