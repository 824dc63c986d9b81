"""Judge one artifact on any recorded traces; the last line printed is one JSON object.

    python -m predictors.evaluate artifact=outputs/artifacts/forecaster-0123 trace=gptoss20b
    python -m predictors.evaluate artifact=DIR trace=mine.npz max_tokens=30000 residencies=[0.25]

This file knows the command's arguments, and how its result is shown. What is measured joins
predictors and caches, which a predictor may not know: `runtime.judge_artifact` has it, and the
main block, an entry point, brings the two together.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.cli import parse_cli
from data.errors import MoecastError


@dataclass
class Args:
    """Judge an exported predictor on recorded traces, strictly causally.

    artifact: the folder that train.py exported. trace: a name or path of any traces. split: which
    requests are judged; auto takes the "test" requests of the traces that the artifact was fitted
    on, and of any other every request that it was not fitted on. prefetch_experts (per layer and
    token; top-k by default) or prefetch_bytes (per token): the budget at which wasted bytes are
    told.
    """

    artifact: Path
    trace: str
    max_tokens: int | None = None
    residencies: list[float] = field(default_factory=lambda: [0.25, 0.4, 0.5])
    lookaheads: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    policies: list[str] = field(default_factory=list)
    prefetch_experts: int | None = None
    prefetch_bytes: int | None = None
    cost_tokens: int = 256
    split: str = "auto"


def main(argv: Sequence[str], measure: Callable[[Args], dict[str, Any]]) -> None:
    """Command line: a table for people, then one line of JSON.

    Args:
        argv: Without the program's name.
        measure: Measures what the arguments ask for; its keys are those of the JSON line.

    Raises:
        SystemExit: Code 2 after one line on stderr, where the arguments or the files are wrong.
    """
    args = parse_cli(Args, argv)
    try:
        result = measure(args)
    except (MoecastError, ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"{format_result(result)}\n{json.dumps(result, allow_nan=False)}\n")


def format_result(result: Mapping[str, Any]) -> str:
    """The result for people."""
    top_k = result["top_k"]
    lines = [
        f"{result['kind']} on {result['model']}",
        f"judged: {result['judged']['why']}",
        f"        {result['judged']['num_requests']} requests, {result['num_tokens']} tokens",
        "",
        "recall@k   " + "  ".join(f"{k:>6}" for k in result["recall_curve"]),
        "           " + "  ".join(f"{value:6.1%}" for value in result["recall_curve"].values()),
        "ahead      " + "  ".join(f"{h:>6}" for h in result["recall_by_lookahead"]),
        f"recall@{top_k:<4}"
        + "  ".join(f"{value:6.1%}" for value in result["recall_by_lookahead"].values()),
        "",
        f"{'resident':>10}  {'policy':<14}{'hit ratio':>10}{'gap closed':>12}",
    ]
    for residency, ratios in result["hit_ratio"].items():
        for policy, ratio in ratios.items():
            gap = result["gap_closed_by_policy"][residency][policy]
            shown = "-" if gap is None else f"{gap:+.1%}"
            lines.append(f"{float(residency):>10.0%}  {policy:<14}{ratio:>10.2%}{shown:>12}")
    prefetch, cost = result["prefetch"], result["cost"]
    wasted = prefetch["wasted_bytes_per_token"]
    lines += [
        "",
        f"prefetch of {prefetch['experts_per_layer']} experts a layer: "
        f"covers {prefetch['coverage']:.1%}, wastes {prefetch['wasted']} of {prefetch['issued']}"
        + ("" if wasted is None else f", {wasted / 1e6:.1f} MB a token"),
        f"cost: {cost['num_parameters']} parameters, {result['us_per_token']:.0f} us a token"
        + _and(cost["us_per_token_gpu"], " ({:.0f} on the GPU)")
        + _and(cost["fit_s"], ", fitted in {:.1f} s"),
        "calibration error: "
        + _and(result["reliability"]["expected_calibration_error"], "{:.4f}", "it said nothing"),
    ]
    return "\n".join(lines)


def _and(value: float | None, text: str, otherwise: str = "") -> str:
    return otherwise if value is None else text.format(value)


if __name__ == "__main__":
    from runtime.judge_artifact import judge_artifact

    main(
        sys.argv[1:],
        lambda args: judge_artifact(
            args.artifact,
            args.trace,
            split=args.split,
            residencies=args.residencies,
            lookaheads=args.lookaheads,
            policies=args.policies or None,
            max_tokens=args.max_tokens,
            cost_tokens=args.cost_tokens,
            prefetch_experts=args.prefetch_experts,
            prefetch_bytes=args.prefetch_bytes,
        ),
    )
