"""predictors/fit/jobs.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import MoecastError
from predictors.fit.jobs import JOB_FILE, job_record, read_jobs


def write_job(sweep: Path, number: int, *overrides: str, **fields: Any) -> None:
    values: dict[str, Any] = {"predictor": "semantic", "seed": 0, "summary": {}, "failure": None}
    record = job_record(number=number, overrides=overrides, **{**values, **fields})
    folder = sweep / str(number)
    folder.mkdir(parents=True)
    (folder / JOB_FILE).write_text(json.dumps(record))


def test_a_label_says_in_what_jobs_differ_but_for_seeds(tmp_path: Path) -> None:
    for number, (m, seed) in enumerate([(1, 0), (1, 1), (32, 0), (32, 1)]):
        overrides = ("source=gptoss20b", f"predictor.neighbours={m}", f"seed={seed}")
        write_job(tmp_path, number, *overrides, seed=seed)
    jobs = read_jobs(tmp_path)
    assert [job.label for job in jobs] == ["semantic neighbours=1"] * 2 + [
        "semantic neighbours=32"
    ] * 2
    assert [job.seed for job in jobs] == [0, 1, 0, 1]


def test_jobs_come_in_the_order_of_the_sweep(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_job(tmp_path, number, f"predictor=p{number}", predictor=f"p{number}")
    assert [job.label for job in read_jobs(tmp_path)] == ["p0", "p2", "p10"]


@pytest.mark.parametrize(
    ("failure", "reason", "is_ours"),
    [
        (MoecastError("two\n lines"), "two lines", False),
        (ValueError("k=0: must be at least 1"), "k=0: must be at least 1", False),
        (ImportError("install it"), "install it", False),
        (KeyError("x"), "KeyError: 'x'", True),
        (RuntimeError(), "RuntimeError: RuntimeError", True),
    ],
)
def test_a_failure_is_one_line_and_says_whose_it_is(
    tmp_path: Path, failure: Exception, reason: str, is_ours: bool
) -> None:
    write_job(tmp_path, 0, "predictor=semantic", failure=failure)
    (job,) = read_jobs(tmp_path)
    assert (job.reason, job.is_ours, job.evaluation) == (reason, is_ours, None)


def test_a_folder_without_jobs_is_empty(tmp_path: Path) -> None:
    assert read_jobs(tmp_path) == []
