import json

import pytest

from benchmarks import collect_overhead


def test_the_last_line_is_json_of_all_that_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["batch_size=2", "prompt_tokens=4", "new_tokens=2", "repeats=5"]
    monkeypatch.setattr("sys.argv", ["collect_overhead", *arguments])
    collect_overhead.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["model"] == "tiny_moe"
    assert result["recorded_s"] > 0
    assert result["overhead_quartiles"][0] <= result["overhead"] <= result["overhead_quartiles"][1]


def test_a_median_of_fewer_than_five_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["collect_overhead", "repeats=4"])
    with pytest.raises(SystemExit):
        collect_overhead.main()
    assert "repeats=4: must be at least 5" in capsys.readouterr().err
