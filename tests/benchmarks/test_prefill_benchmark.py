"""The prefill benchmark end to end on a tiny model: what it moves, and that it changes no bit."""

import json

import pytest

from benchmarks import prefill as benchmark
from benchmarks.prefill import Options


@pytest.mark.parametrize("shape", ["gptoss20b", "dsv2lite", "qwen3_30b"])
def test_a_small_run_counts_its_bytes_and_stays_exact(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(
        [
            f"shape={shape}",
            "small=true",
            "repeats=1",
            "device=cpu",
            "dtype=float32",
            "chunk_tokens=48,96",
            "staging=1,3",
        ]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["rows"]
    assert [(r["slots"], r["chunk_tokens"], r["staging"]) for r in rows] == [
        (8, 48, 1), (2, 48, 1), (2, 48, 3), (8, 96, 1), (2, 96, 1), (2, 96, 3),
    ]  # fmt: skip
    assert all(row["exact"] and row["finite"] for row in rows)
    for row in rows:
        moved_bytes = row["link_bytes"] - row["wasted_bytes"]
        assert moved_bytes == row["misses"] * result["record_bytes"]
        chunks = {48: 2, 96: 1}[row["chunk_tokens"]]
        assert row["misses"] <= (8 - row["slots"]) * 2 * chunks
        assert (row["misses"] > 0) == (row["slots"] < 8)
        assert row["peak_bytes"] is None
    assert result["link_bytes_per_s"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "none"}, "shape=none"),
        ({"residencies": (1.5,)}, "residencies"),
        ({"staging": (0,)}, "staging"),
        ({"tokens": 0}, "tokens=0"),
    ],
    ids=str,
)
def test_options_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**arguments)  # type: ignore[arg-type]
