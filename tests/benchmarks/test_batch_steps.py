"""Both ways of running are timed on the embedded model."""

from benchmarks.batch_steps import Options, measure


def test_every_kind_of_step_is_timed() -> None:
    row = measure(Options(batches=(1, 3)), 0.5)
    assert row["single_s"] > 0
    assert set(row["batch_s"]) == {"1", "3"}
    # Three rows share a pass: not three times one row's, with room for a busy machine.
    assert row["batch_s"]["3"] < 10 * row["batch_s"]["1"]
    assert 0 < row["hit_ratio"] < 1
