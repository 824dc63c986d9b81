"""The jobs of a multirun: what each leaves in its folder, and reading them back in order.

Knows nothing of Hydra, nor of how a board looks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import MoecastError

JOB_FILE = "job.json"
# Overrides that a row of the board averages over, rather than being about.
_REPEATS = ("seed", "source.split_seed", "collect.seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job of a multirun.

    Attributes:
        number: Its place in the sweep.
        label: Predictor, and every other override in which the jobs differ, but for seeds.
        predictor: The option of the group.
        seed: Of the run.
        evaluation: What was measured; None where it failed, or did not evaluate.
        reason: Why it failed, in one line; None where it did not.
        is_ours: It failed by an error of the program, not of its inputs.
        not_exported: Why there is no artifact, in one line; None where there is or none was asked.
    """

    number: int
    label: str
    predictor: str
    seed: int
    evaluation: dict[str, Any] | None
    reason: str | None
    is_ours: bool
    not_exported: str | None


def job_record(
    *,
    number: int,
    overrides: Sequence[str],
    predictor: str,
    seed: int,
    summary: Mapping[str, Any],
    failure: Exception | None,
) -> dict[str, Any]:
    """Plain values of a job, for `JOB_FILE`."""
    reason = None
    expected = isinstance(failure, (MoecastError, ValueError, ImportError))
    if failure is not None:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        if not expected:
            reason = f"{type(failure).__name__}: {reason}"
    return {
        "number": number,
        "overrides": list(overrides),
        "predictor": predictor,
        "seed": seed,
        "reason": reason,
        "is_ours": failure is not None and not expected,
        "evaluation": summary.get("evaluation"),
        "artifact": summary.get("artifact"),
        "not_exported": summary.get("not_exported"),
    }


def read_jobs(sweep: Path) -> list[Job]:
    """The jobs whose folders lie in ``sweep``, by number."""
    records = sorted(
        (json.loads(path.read_text(encoding="utf-8")) for path in sweep.glob(f"*/{JOB_FILE}")),
        key=lambda record: int(record["number"]),
    )
    varying = _varying([record["overrides"] for record in records])
    return [
        Job(
            number=record["number"],
            label=_label(record, varying),
            predictor=record["predictor"],
            seed=record["seed"],
            evaluation=record["evaluation"],
            reason=record["reason"],
            is_ours=record["is_ours"],
            not_exported=record["not_exported"],
        )
        for record in records
    ]


def _varying(overrides: Sequence[Sequence[str]]) -> set[str]:
    """Keys whose values differ between jobs."""
    values: dict[str, set[str]] = {}
    for job in overrides:
        for key, _, value in (override.partition("=") for override in job):
            values.setdefault(key.lstrip("+"), set()).add(value)
    return {key for key, found in values.items() if len(found) > 1}


def _label(record: Mapping[str, Any], varying: set[str]) -> str:
    parts = [str(record["predictor"])]
    for key, _, value in (override.partition("=") for override in record["overrides"]):
        key = key.lstrip("+")
        if key in varying and key != "predictor" and key not in _REPEATS:
            parts.append(f"{key.removeprefix('predictor.')}={value}")
    return " ".join(parts)
