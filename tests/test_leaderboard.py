"""A multirun as a user calls it, on the embedded model: one table, one page, and what failed."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.leaderboard import LeaderboardCallback
from predictors.fit.jobs import JOB_FILE, job_record
from tests.test_train import SMALL, train


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    outputs = tmp_path_factory.mktemp("sweep") / "outputs"
    result = train(
        outputs,
        SMALL,
        "predictor=popularity,oracle",
        # Half of the jobs fail: gamma must be below 1.
        "predictor.gamma=0.9,2.0",
        "evaluate.baselines=[]",
        "evaluate.max_tokens=40",
        "--multirun",
        logger="wandb",
    )
    assert result.returncode == 0, result.stderr + result.stdout
    return outputs, result.stdout, result.stderr


def test_a_multirun_ends_in_one_table_and_one_line_of_json(swept: tuple[Path, str, str]) -> None:
    _, stdout, _ = swept
    assert stdout.count("us/token") == 1
    table = stdout[stdout.index("us/token") :]
    for name in ("popularity", "oracle", "lfru", "belady", "could not run"):
        assert name in table
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["jobs"] == 4
    assert {row["label"] for row in summary["rows"]} == {
        f"{name} gamma=0.9" for name in ("popularity", "oracle")
    }


def test_a_job_that_cannot_run_does_not_end_the_sweep(swept: tuple[Path, str, str]) -> None:
    _, stdout, stderr = swept
    failed = json.loads(stdout.splitlines()[-1])["failed"]
    assert [job["label"] for job in failed] == [
        f"{name} gamma=2.0" for name in ("popularity", "oracle")
    ]
    assert {job["reason"] for job in failed} == {"gamma=2.0: must be in [0, 1)"}
    assert "Traceback" not in stderr + stdout


def test_what_cannot_be_exported_is_judged_all_the_same(swept: tuple[Path, str, str]) -> None:
    outputs, stdout, _ = swept
    summary = json.loads(stdout.splitlines()[-1])
    assert list(summary["not_exported"]) == ["oracle gamma=0.9"]
    assert [path.name.split("-")[0] for path in (outputs / "artifacts").iterdir()] == ["popularity"]


def test_the_page_needs_no_other_file(swept: tuple[Path, str, str]) -> None:
    _, stdout, _ = swept
    page = Path(json.loads(stdout.splitlines()[-1])["leaderboard"]).read_text()
    assert "http" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("<svg") >= 6
    for title in ("Hit ratio against budget", "Recall by layer", "Recall by lookahead", "costs"):
        assert title in page


def test_policies_without_forecasts_are_replayed_once(swept: tuple[Path, str, str]) -> None:
    outputs, _, _ = swept
    assert len(list((outputs / "evaluations").glob("policies-*.json"))) == 1


def test_each_job_is_a_tracked_run_of_its_own(swept: tuple[Path, str, str]) -> None:
    outputs, _, _ = swept
    runs = [list(job.glob("wandb/offline-run-*")) for job in outputs.glob("sweeps/*/*/[0-9]*")]
    assert [len(found) for found in runs] == [1] * 4


def test_a_sweep_in_which_nothing_ran_fails_and_says_why(tmp_path: Path) -> None:
    result = train(
        tmp_path / "outputs",
        "source=jsonl",
        "source.path=/no/such/file",
        "predictor=popularity,none",
        "--multirun",
    )
    assert result.returncode == 1
    assert result.stdout.count("/no/such/file") >= 2
    assert "Traceback" not in result.stdout + result.stderr


def end_sweep(folder: Path, *failures: Exception | None) -> None:
    for number, failure in enumerate(failures):
        record = job_record(
            number=number,
            overrides=[f"predictor=p{number}"],
            predictor=f"p{number}",
            seed=0,
            summary={},
            failure=failure,
        )
        (folder / str(number)).mkdir()
        (folder / str(number) / JOB_FILE).write_text(json.dumps(record))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    LeaderboardCallback().on_multirun_end(config)


@pytest.mark.parametrize("failures", [[ValueError("no routers")], [None, KeyError("a bug")]])
def test_a_failed_sweep_has_code_1(tmp_path: Path, failures: list[Exception | None]) -> None:
    with pytest.raises(SystemExit) as stopped:
        end_sweep(tmp_path, *failures)
    assert stopped.value.code == 1
    assert (tmp_path / "leaderboard.html").exists()


def test_a_job_that_failed_by_its_inputs_does_not_fail_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end_sweep(tmp_path, None, ValueError("no routers"))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["failed"] == [{"label": "p1", "seed": 0, "reason": "no routers"}]


def test_another_commands_multirun_has_no_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end_sweep(tmp_path)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_board_that_cannot_be_made_is_an_error_and_not_a_warning(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / JOB_FILE).write_text("{}")
    with pytest.raises(SystemExit):
        end_sweep(tmp_path)
