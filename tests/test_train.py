"""The whole path, in process and as a user calls it, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = "debug=small"


def train(outputs: Path, *overrides: str, logger: str = "none") -> subprocess.CompletedProcess[str]:
    """Run train.py from another folder, as a user with an empty home would."""
    command = [sys.executable, str(ROOT / "train.py"), f"paths.root={outputs}", f"logger={logger}"]
    return subprocess.run(
        [*command, *overrides],
        cwd=outputs.parent,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(outputs.parent), "OMP_NUM_THREADS": "1"},
    )


def summary(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    outputs = tmp_path_factory.mktemp("train") / "outputs"
    result = train(outputs, SMALL, logger="wandb")
    return outputs, summary(result), result.stdout


def test_one_command_collects_fits_judges_and_exports(
    first: tuple[Path, dict[str, Any], str],
) -> None:
    outputs, values, stdout = first
    artifact = Path(values["artifact"])
    assert artifact.is_relative_to(outputs)
    assert (artifact / "manifest.json").is_file()
    assert "data:image/png;base64," in Path(values["report"]).read_text()
    for row in ("semantic", "previous_token", "popularity", "oracle", "belady"):
        assert row in stdout
    metrics = values["metrics"]
    assert 4 / 32 < metrics["recall/lookahead_1"] < 1
    assert 0 < metrics["hit_ratio/residency_0.25"] < metrics["hit_ratio/residency_0.5"] < 1
    assert list(Path(values["run"]).glob("wandb/offline-run-*")), "W&B is offline by default"


def test_what_is_done_is_not_done_again(first: tuple[Path, dict[str, Any], str]) -> None:
    outputs, values, _ = first
    result = train(outputs, SMALL)
    assert summary(result)["artifact"] == values["artifact"]
    assert result.stderr.count("done before") + result.stdout.count("done before") == 4


def test_another_predictor_shares_the_traces(first: tuple[Path, dict[str, Any], str]) -> None:
    outputs, values, _ = first
    other = summary(train(outputs, SMALL, "predictor=popularity"))
    assert other["traces"] == values["traces"]
    assert other["artifact"] != values["artifact"]
    assert len(list((outputs / "traces").iterdir())) == 1


@pytest.mark.parametrize("override", ["router_reuse", "gate_mlp predictor.steps=2"])
def test_a_predictor_that_reads_the_model_goes_all_the_way(
    first: tuple[Path, dict[str, Any], str], override: str
) -> None:
    outputs, values, _ = first
    other = summary(train(outputs, SMALL, *f"predictor={override}".split()))
    assert other["traces"] == values["traces"]
    evaluation = next(outputs.glob(f"evaluations/{other['predictor']}-*/evaluation.json"))
    judged = json.loads(evaluation.read_text())["predictors"][other["predictor"]]["layer_recall"]
    recalls = [judged["by_lookahead"][h] for h in ("1", "2", "3", "4")]
    assert sorted(recalls, reverse=True) == recalls
    assert recalls[3] > 2 * 4 / 32, "no better than twice chance"
    assert (Path(other["artifact"]) / "manifest.json").is_file()


def test_a_stage_without_its_input_says_which_to_add(
    first: tuple[Path, dict[str, Any], str],
) -> None:
    outputs, _, _ = first
    result = train(outputs, SMALL, "seed=7", "stages=[evaluate]")
    assert result.returncode == 1
    assert "'collect' has not been run" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("predictor=semantix", "semantic"),
        ("stages=[colect]", "collect"),
        ("evaluate.baselines=[popularty]", "popularity"),
        ("predictor.neighbours=0", "neighbours=0"),
        ("sed=3", "sed"),
        ("model=no/such-model", "no/such-model"),
        ("source=jsonl source.path=/no/such/file", "/no/such/file"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, override: str, message: str) -> None:
    result = train(tmp_path / "outputs", *override.split())
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
