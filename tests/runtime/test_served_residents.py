"""Residents follow the requests that begin, and never change while one runs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import spec_of
from data.errors import SpecMismatchError
from runtime.engine import attach
from runtime.observed_request import PassRow
from runtime.offload import Offload
from runtime.resident_planner import ResidentPlanner
from tests.families import tiny_model
from tests.predictors.task_profiles import profile_of

SLOTS = 8  # of 16: code's half, or talk's


def lossy(model: Any, *, waiting: Sequence[tuple[str, int]] = (), **options: Any) -> Offload:
    profile = profile_of(spec=spec_of(model))
    offload = attach(
        model, mode="resident_only", slots=SLOTS, resident_scores_LE=profile.use_GLE.mean(dim=0)
    )
    planner = ResidentPlanner(
        profile=profile, slots=offload.slots, **{"skip_loss": 0.0, "period": 1, **options}
    )
    offload.plan_residents(planner, waiting=lambda limit: waiting[:limit])
    return offload


def row(key: str, prompt: str | None, ids: Sequence[int] = (1, 2, 3), position: int = 0) -> PassRow:
    return PassRow(key, prompt, [1, 2, 3], list(ids), position)


@torch.no_grad()
def run(model: Any, offload: Offload, rows: Sequence[PassRow]) -> None:
    offload.announce(rows)
    model(torch.tensor([[token for one in rows for token in one.ids]]), use_cache=False)


def halves(offload: Offload) -> Tensor:
    """How many of the first half of each layer's experts are resident."""
    resident_LE: Tensor = offload.view(goes_on=False).resident_LE
    return resident_LE[:, :8].sum(dim=1)


def test_a_request_gets_the_experts_of_its_task() -> None:
    model = tiny_model("qwen3_moe")
    with lossy(model) as offload:
        run(model, offload, [row("1", "def f")])
        assert (halves(offload) == 8).all()
        offload.end_request("1")
        run(model, offload, [row("2", "hello")])
        assert (halves(offload) == 0).all()
        stats = offload.stats()
    assert (stats.resident_plans, stats.layers_changed, stats.layers_kept) == (2, 6, 0)
    assert stats.requests_of_task == {"code": 1, "talk": 1}
    assert stats.misses == 0


def test_those_that_wait_count_too() -> None:
    model = tiny_model("qwen3_moe")
    with lossy(model, waiting=[("hello there", 5000)], period=2) as offload:
        run(model, offload, [row("1", "def f")])
        assert (halves(offload) == 0).all()


def test_those_that_begin_together_are_decided_for_together() -> None:
    """Talk has fewer tokens to come than the two of code; whose rows come first is no matter."""
    model = tiny_model("qwen3_moe")
    with lossy(model, waiting=[("hello", 5000)], period=3) as offload:
        rows = [row("1", "hello", [1]), row("2", "def", range(99)), row("3", "def", range(99))]
        run(model, offload, [one._replace(prompt_ids=one.ids) for one in rows])
        assert (halves(offload) > 4).all()
        assert offload.stats().resident_plans == 1


def test_nothing_changes_while_a_request_runs() -> None:
    """The second one begins while the first runs, and does not end with it."""
    model = tiny_model("qwen3_moe")
    with lossy(model) as offload:
        run(model, offload, [row("1", "def f")])
        run(model, offload, [row("1", "def f", [4], 3), row("2", "hello")])
        run(model, offload, [row("1", "def f", [5], 4), row("2", "hello", [5], 3)])
        offload.end_request("1")
        run(model, offload, [row("2", "hello", [6], 4)])
        assert (halves(offload) == 8).all()
        assert offload.stats().resident_plans == 1
        offload.end_request("2")
        run(model, offload, [row("3", "hello")])
        assert (halves(offload) == 0).all()


def test_pieces_of_a_prompt_are_one_request_and_the_trial_is_none() -> None:
    model = tiny_model("qwen3_moe")
    with lossy(model) as offload:
        run(model, offload, [row("try-out", "")])
        offload.end_request("try-out", remember=False)
        assert offload.stats().resident_plans == 0
        run(model, offload, [row("1", "def f", [1, 2])])
        run(model, offload, [row("1", "def f", [3], 2)])
        run(model, offload, [row("1", "def f", [4], 3)])
        assert offload.stats().requests_of_task == {"code": 1, "talk": 0}


def test_a_planner_learns_what_the_routers_wanted_of_requests_that_ran_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    learned: list[tuple[int, Tensor]] = []
    monkeypatch.setattr(
        ResidentPlanner, "finished", lambda _, task, use_LE: learned.append((task, use_LE))
    )
    with lossy(model) as offload:
        run(model, offload, [row("1", "hello")])
        offload.end_request("1")
        run(model, offload, [row("2", "hello")])
        offload.end_request("2", remember=False)
        run(model, offload, [row("3", "def"), row("4", "def")])
        offload.end_request("3")
        offload.end_request("4")
        run(model, offload, [row("5", "def")])
        offload.end_request("5")
        rerouted = offload.stats().rerouted
    assert [task for task, _ in learned] == [1, 0]
    top_k = spec_of(model).top_k
    for _, use_LE in learned:
        torch.testing.assert_close(use_LE.sum(dim=1), torch.full((3,), float(top_k)))
    assert rerouted > 0
    assert (learned[0][1][:, :8] > 0).any()  # wanted, though talk's half alone was resident


def test_what_was_learned_is_of_the_request_and_not_of_passes_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    learned: list[Tensor] = []
    monkeypatch.setattr(ResidentPlanner, "finished", lambda _, task, use_LE: learned.append(use_LE))
    with lossy(model) as offload:
        model(torch.tensor([[9, 9, 9, 9]]), use_cache=False)  # announced by nobody
        run(model, offload, [row("1", "hello", [7])])
        offload.end_request("1")
    assert set(learned[0].flatten().tolist()) == {0.0, 1.0}  # one token's


def test_only_the_lossy_mode_has_residents_to_plan_and_only_for_its_own_slots() -> None:
    model = tiny_model("qwen3_moe")
    profile = profile_of(spec=spec_of(model))
    planner = ResidentPlanner(profile=profile, slots=(SLOTS,) * 3)
    with attach(model, slots=SLOTS) as offload, pytest.raises(ValueError, match="lossless"):
        offload.plan_residents(planner)
    scores_LE = profile.use_GLE[0]
    with attach(model, mode="resident_only", slots=6, resident_scores_LE=scores_LE) as offload:
        with pytest.raises(ValueError, match=r"slots=\(8, 8, 8\): the offload has \(6, 6, 6\)"):
            offload.plan_residents(planner)
        with pytest.raises(SpecMismatchError, match="profile of tasks"):
            offload.plan_residents(ResidentPlanner(profile=profile_of(), slots=(2, 2)))
