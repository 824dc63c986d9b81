import json
from pathlib import Path

import pytest

from benchmarks import collect_overhead


def test_the_last_line_is_json_of_all_that_was_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["batch_size=2", "prompt_tokens=4", "new_tokens=2", "repeats=5"]
    collect_overhead.main([*arguments, f"out={tmp_path / 'kept.json'}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "kept.json").read_text()) == result
    assert result["circumstances"]["versions"]["torch"]
    assert result["model"] == "tiny_moe"
    assert result["recorded_s"] > 0
    assert result["overhead_quartiles"][0] <= result["overhead"] <= result["overhead_quartiles"][1]


def test_a_median_of_fewer_than_five_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        collect_overhead.main(["repeats=4"])
    assert "repeats=4: must be at least 5" in capsys.readouterr().err
