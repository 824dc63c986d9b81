"""A model with all its experts has perfect figures, and every speed has its quality beside it."""

from typing import Any

import pytest

from benchmarks.resident_only import Options, run


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(
        Options(
            num_prompts=40,
            prompt_tokens=24,
            answer_tokens=6,
            residencies=(0.2, 1.0),
            seeds=1,
            timed_prompts=1,
            repeats=1,
        )
    )


def test_every_speed_has_its_quality_beside_it(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["mode"] == "resident_only"
        assert set(row["quality"]) == {"popular", "random", "own"}
        assert set(row["tokens_per_s"]) == {"resident_only", "exact", "all_resident"}
    assert result["model"].startswith("tiny_moe")


def test_all_experts_are_the_full_model_and_a_fifth_are_not(result: dict[str, Any]) -> None:
    few, everybody = result["rows"]
    for quality in (everybody["quality"]["popular"], everybody["quality"]["own"]):
        assert quality["agreement"] == 1.0
        assert quality["kl_nats"] == pytest.approx(0.0, abs=1e-5)
        assert quality["perplexity"] == pytest.approx(result["full_perplexity"], rel=1e-5)
    assert everybody["saved_bytes"] == 0
    assert few["saved_bytes"] > 0
    popular = few["quality"]["popular"]
    assert 0.0 < popular["rerouted"] < 1.0
    assert popular["agreement"] < 1.0
    assert popular["kl_nats"] < few["quality"]["random"]["kl_nats"]["median"]
    assert popular["perplexity"] > result["full_perplexity"]
