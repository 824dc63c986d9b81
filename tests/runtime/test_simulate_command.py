"""The command that replays a trace, from its arguments to its line of JSON."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data.importers.per_token_npz import read_per_token_npz
from predictors.artifact import save_artifact
from predictors.popularity import Popularity
from runtime.simulate import main
from tests.runtime.replay_fakes import random_request


def write_npz(folder: Path) -> Path:
    path = folder / "x.npz"
    experts = np.array(random_request(random.Random(0), 30), np.uint8)
    np.savez(path, experts=experts, seq_offsets=np.array([0, 10, 30]))
    (folder / "x.info.json").write_text(json.dumps({"model": "test", "num_experts": 6}))
    return path


def test_the_command_ends_with_one_line_of_json(tmp_path, capsys) -> None:
    main([f"trace={write_npz(tmp_path)}", "policy=[lru,belady]", "slots=[3,5]"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [(r["policy"], r["slots"]) for r in report["results"]] == [
        ("lru", 3),
        ("lru", 5),
        ("belady", 3),
        ("belady", 5),
    ]
    required = {
        *("policy", "slots", "budget_bytes", "hit_ratio", "hits", "accesses"),
        *("miss_bytes", "gap_closed"),
    }
    assert all(required <= set(result) for result in report["results"])
    assert report["results"][0]["accesses"] == 30 * 2 * 2
    assert sum(line.split()[:1] in (["lru"], ["belady"]) for line in lines) == 4


def test_the_command_replays_an_artifacts_forecasts(tmp_path, capsys) -> None:
    trace = write_npz(tmp_path)
    predictor = Popularity()
    predictor.fit(read_per_token_npz(trace))
    spec = predictor.fitted_spec()
    artifact = save_artifact(predictor, tmp_path / "artifact", spec=spec, parents={})
    main([f"trace={trace}", "policy=forecast", "slots=3", f"artifact={artifact}"])
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert result["policy"] == "forecast"
    assert 0 < result["hits"] < result["accesses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy=forecast", "slots=3", "artifact=none/there"], "none/there is no artifact"),
        (["policy=lru", "slots=1"], "slots=1: must be at least top-k=2"),
        (["policy=nope", "slots=3"], "'nope' does not exist; there are fifo"),
        (["policy=lru"], "neither was given"),
        (["policy=lru", "slots=3", "budget_bytes=5"], "both were given"),
        (["policy=lru", "slot=3"], "unknown key 'slot'"),
    ],
)
def test_the_command_explains_bad_input(arguments, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([f"trace={write_npz(tmp_path)}", *arguments])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
