"""A model with all its experts has perfect figures, and every speed has its quality beside it."""

from typing import Any

import pytest

from benchmarks.resident_only import Options, Speed, compared, run, told


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


def test_latencies_are_over_all_requests_and_throughputs_over_rounds() -> None:
    rounds = [Speed([1.0, 3.0], [0.5, 0.5], 30.0), Speed([1.0, 1.0], [0.25, 0.25], 50.0)]
    found = told(rounds, num_tokens=10)
    assert (found["request_s_p50"], found["num_latencies"]) == (1.0, 4)
    assert found["first_token_s_p50"] == 0.375
    assert (found["tokens_per_s"]["min"], found["tokens_per_s"]["max"]) == (5.0, 10.0)
    assert found["batch_tokens_per_s"]["median"] == 40.0


def test_shares_are_of_the_same_round() -> None:
    """The second round was twice as slow for both."""
    half = [Speed([2.0], [1.0], 10.0), Speed([4.0], [1.0], 5.0)]
    whole = [Speed([1.0], [1.0], 40.0), Speed([2.0], [1.0], 20.0)]
    found = compared(half, whole)
    assert (found["of_all_resident"]["min"], found["of_all_resident"]["max"]) == (0.5, 0.5)
    assert found["batch_of_all_resident"]["median"] == 0.25


def test_every_speed_has_its_quality_beside_it(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["mode"] == "resident_only"
        assert set(row["quality"]) == {"popular", "random", "own"}
        assert set(row["speed"]) == {"resident_only", "exact", "all_resident"}
        assert row["speed"]["all_resident"]["of_all_resident"]["median"] == 1.0
        for speed in row["speed"].values():
            assert 0 < speed["first_token_s_p50"] < speed["request_s_p50"] <= speed["request_s_p99"]
            assert speed["tokens_per_s"]["median"] > 0
            assert speed["batch_tokens_per_s"]["median"] > 0
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
