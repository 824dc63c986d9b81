import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import index as benchmark

DIM = 16


def real_vectors(num_vectors: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors_NS = rng.normal(size=(20, DIM))[rng.integers(0, 20, num_vectors)]
    vectors_NS = vectors_NS + 0.5 * rng.normal(size=(num_vectors, DIM))
    return (vectors_NS / np.linalg.norm(vectors_NS, axis=1, keepdims=True)).astype(np.float32)


def test_synthesised_records_are_as_near_to_a_real_one_as_real_ones_are_to_each_other() -> None:
    around = benchmark.Neighbourhoods.of(real_vectors())
    records_NS = around.synthesised(3000, np.random.default_rng(1))
    assert np.linalg.norm(records_NS, axis=1) == pytest.approx(1.0, abs=1e-4)
    cosine_NM = records_NS @ around.real_NS.T
    # Another real one may happen to be nearer than the one that a record was made from.
    assert np.median(cosine_NM.max(axis=1)) == pytest.approx(np.median(around.cosine_N), abs=0.05)


def test_equal_vectors_are_kept_once_and_in_order() -> None:
    vectors_NS = real_vectors(5)
    repeated_NS = vectors_NS[[0, 1, 0, 2, 2, 3, 4]]
    assert np.array_equal(benchmark.distinct(repeated_NS), vectors_NS)


def test_the_last_line_is_the_record_and_the_file_holds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "CHANGING_S", 0.1)
    np.save(tmp_path / "real.npy", real_vectors())
    benchmark.main(
        ["sizes=[200,1000]", f"embeddings={tmp_path / 'real.npy'}", f"out={tmp_path / 'out.json'}"]
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads((tmp_path / "out.json").read_text())
    small, large = told["results"]
    assert (small["num_records"], small["num_real_records"], small["kind"]) == (200, 200, "exact")
    assert (large["num_records"], large["num_real_records"]) == (1000, 360)
    assert large["recall_at_1"] == 1.0
    assert large["query_ms"]["repeats"] == 5
    assert large["while_changing"]["replaced_per_s"] > 0
    assert told["num_real_embeddings"] == 400
