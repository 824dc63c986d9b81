"""A replay moves and judges what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.resident_tasks import WAYS, Asked, Options, gain_over, replay, run
from data.adapters import moe_layers, spec_of
from runtime.engine import attach
from runtime.resident_planner import ResidentPlanner
from runtime.restricted_quality import Quality, say_all
from tests.families import tiny_model
from tests.predictors.task_profiles import profile_of


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def stream(model: Any) -> list[Asked]:
    prompts = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([2, 7, 1, 8])]
    first, second = say_all(model, prompts, spec_of(model), 4)
    return [Asked("code", "def", first), Asked("talk", "hello", second)] * 2


def replayed(model: Any, stream: list[Asked], *, slots: int, **options: Any) -> dict[str, Any]:
    profile = profile_of(spec=spec_of(model))
    scores_LE = profile.use_GLE.mean(dim=0)
    with attach(model, mode="resident_only", slots=slots, resident_scores_LE=scores_LE) as offload:
        planner = None
        if period := options.pop("period", None):
            planner = ResidentPlanner(
                profile=profile, slots=offload.slots, period=period, skip_loss=0.0
            )
        settings = {"own_period": None, "queue": 8, "expert_bytes": 10, **options}
        quality, found = replay(model, offload, stream, planner, **settings)
    assert len(quality) == len(stream)
    return found


def test_residents_that_follow_each_task_are_loaded_for_each_request(
    model: Any, stream: list[Asked]
) -> None:
    found = replayed(model, stream, slots=8, period=1)
    layers = len(moe_layers(model))
    # From all tasks' to code's: 4 of 8 in each layer; then talk's, code's, talk's whole halves.
    assert found["loaded_bytes_per_request"] == layers * (4 + 3 * 8) * 10 / 4
    assert found["layers_kept"] == 0
    seldom = replayed(model, stream, slots=8, period=4)
    assert seldom["loaded_bytes_per_request"] < found["loaded_bytes_per_request"]


def test_residents_that_nobody_plans_stay(model: Any, stream: list[Asked]) -> None:
    found = replayed(model, stream, slots=8)
    assert found["loaded_bytes_per_request"] == 0
    assert found["layers_kept"] is None
    assert 0 < found["rerouted"] < 1


def test_with_what_requests_use_themselves_less_is_rerouted(
    model: Any, stream: list[Asked]
) -> None:
    assert (
        replayed(model, stream, slots=8, own_period=1)["rerouted"]
        < replayed(model, stream, slots=8)["rerouted"]
    )


def test_all_experts_are_the_full_model(model: Any, stream: list[Asked]) -> None:
    found = replayed(model, stream, slots=16, period=1)
    assert (found["agreement"], found["rerouted"]) == (1.0, 0.0)
    assert found["loaded_bytes_per_request"] == 0


def test_gains_are_of_the_same_requests() -> None:
    def with_agreement(*shares: float) -> list[Quality]:
        return [Quality(share, 0.0, 0.0, 1) for share in shares]

    found = gain_over(with_agreement(0.1, 0.9), with_agreement(0.3, 0.9))
    assert found["agreement_gain"] == pytest.approx(0.1)
    assert found["agreement_gain_se"] == pytest.approx(0.1)  # unpaired it would be 0.5


@pytest.mark.usefixtures("shared_data")
def test_every_way_has_a_row(tmp_path: Path) -> None:
    options = Options(
        num_prompts=78,
        num_requests=6,
        prompt_tokens=12,
        answer_tokens=2,
        residencies=(0.4,),
        periods=(4,),
        skip_losses=(0.1,),
        min_agreements=(0.5,),
        judged=1,
        epochs=1,
        arrivals=("runs",),
    )
    result = run(options)
    assert set(result["streams"]) == {"runs"}
    for found in result["streams"].values():
        assert [row["way"] for row in found["residencies"]] == list(WAYS)
        assert [row["way"] for row in found["periods"]] == list(WAYS[1:])
        assert [row["min_agreement"] for row in found["skips"]] == [1.1, 0.5]
        assert 0.5 < found["tasks_read_right"] <= 1
        own = found["residencies"][-1]
        popular = found["residencies"][0]
        assert own["rerouted"] < popular["rerouted"]
        assert popular["agreement_gain"] == 0
