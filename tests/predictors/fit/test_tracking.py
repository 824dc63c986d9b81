"""Runs are tracked offline, each on its own, and wandb may be absent."""

import sys
from pathlib import Path

import pytest

from predictors.fit.tracking import NullTracker, WandbTracker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def home_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def run_folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def test_two_runs_in_one_process_do_not_share_a_run(tmp_path: Path) -> None:
    """A multirun's second job once logged into the first job's run, which had not been finished."""
    first, second = WandbTracker(project="test"), WandbTracker(project="test")
    first.start({"job": 0}, run_dir=tmp_path, name="first")
    second.start({"job": 1}, run_dir=tmp_path, name="second")
    first.log({"fit/seconds": 1.0, "replay/gap_closed": None})
    second.finish()
    first.finish(failed=True)
    first.finish()
    assert len(run_folders(tmp_path)) == 2


def test_a_run_knows_what_became_known_later(tmp_path: Path) -> None:
    """Digests come with the stages; a second one of the same name replaces the first."""
    tracker = WandbTracker(project="test")
    tracker.start({"seed": 3, "hardware": {"cores": 2}}, run_dir=tmp_path, name="run")
    tracker.describe({"digests": {"traces": "aa"}})
    tracker.describe({"digests": {"traces": "aa", "fitted": "bb"}})
    config = dict(tracker._run.config)
    tracker.finish()
    assert config["digests"] == {"traces": "aa", "fitted": "bb"}
    assert (config["seed"], config["hardware"]) == (3, {"cores": 2})


def test_missing_wandb_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="logger=none"):
        WandbTracker(project="test").start({}, run_dir=tmp_path, name="run")


def test_null_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = NullTracker()
    tracker.start({}, run_dir=tmp_path, name="run")
    tracker.describe({"digests": {}})
    tracker.log({"fit/seconds": 1.0})
    tracker.log_plots({"plot": tmp_path / "plot.png"})
    tracker.finish()
    assert not list(tmp_path.iterdir())


def test_a_project_needs_a_name() -> None:
    with pytest.raises(ValueError, match="project"):
        WandbTracker(project="")
