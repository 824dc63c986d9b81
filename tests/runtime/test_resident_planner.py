"""Eq. 2 by hand; who is resident follows the queue, every so many requests, where it pays."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data.schema import MoESpec
from predictors.popularity import Popularity
from predictors.task import Task
from runtime.resident_planner import Queued, ResidentPlanner, expected_tokens_LE
from tests.predictors.task_profiles import SPEC, profile_of

CODE, TALK = 0, 1


def planner(**options: Any) -> ResidentPlanner:
    profile = options.pop("profile", None) or profile_of()
    return ResidentPlanner(profile=profile, slots=(2, 2), **{"skip_loss": 0.0, **options})


def resident(decided_LE: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in decided_LE]


def test_an_expert_is_worth_the_tokens_of_sensitive_tasks_that_come_to_it() -> None:
    """Two code prompts of 5 and 7 tokens, answers of 10; one talk of 20, answer 30."""
    use_GLE = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.25, 0.75]]])
    queue = [Queued(CODE, 5), Queued(TALK, 20), Queued(CODE, 7)]
    options = {"use_GLE": use_GLE, "answer_tokens_G": torch.tensor([10.0, 30.0])}
    found_LE = expected_tokens_LE(queue, sensitive_GL=torch.tensor([[True], [True]]), **options)
    assert found_LE.tolist() == [[32 / 2, 32 / 2 + 50 / 4, 50 * 3 / 4]]
    without_chat_LE = expected_tokens_LE(
        queue, sensitive_GL=torch.tensor([[True], [False]]), **options
    )
    assert without_chat_LE.tolist() == [[16.0, 16.0, 0.0]]


def test_residents_are_those_of_the_task_that_brings_most_tokens() -> None:
    asked = planner(period=2)
    assert resident(asked.plan([Queued(CODE, 100)])) == [[0, 1], [0, 1]]
    assert resident(asked.plan([Queued(TALK, 100)])) == [[2, 3], [2, 3]]
    mixed = [Queued(CODE, 100), Queued(TALK, 80)]  # 110 * .75, .25 against 110 * .625, .375
    assert resident(asked.plan(mixed)) == [[0, 2], [0, 2]]
    assert (asked.num_plans, asked.layers_changed, asked.layers_kept) == (3, 6, 0)


def test_only_requests_before_the_next_decision_count() -> None:
    queue = [Queued(CODE, 1), Queued(CODE, 1), *[Queued(TALK, 900)] * 5]
    assert resident(planner(period=2).plan(queue)) == [[0, 1], [0, 1]]
    assert resident(planner(period=3).plan(queue)) == [[2, 3], [2, 3]]


def test_layers_have_slots_of_their_own() -> None:
    asked = ResidentPlanner(profile=profile_of(), slots=(1, 3), skip_loss=0.0)
    found = resident(asked.plan([Queued(CODE, 90), Queued(TALK, 70)]))
    assert found == [[0], [0, 2, 3]]


def test_it_is_asked_for_the_first_request_and_every_period_after_that() -> None:
    asked = planner(period=3)
    due = []
    for _ in range(8):
        due.append(asked.is_due)
        if asked.is_due:
            asked.plan([Queued(CODE, 1)])
        asked.begin()
    assert due == [True, False, False, True, False, False, True, False]


def test_what_is_due_stays_due_until_it_is_done() -> None:
    asked = planner(period=2)
    asked.plan([Queued(CODE, 1)])
    for _ in range(3):
        asked.begin()
    assert asked.is_due
    asked.plan([Queued(CODE, 1)])
    assert not asked.is_due


def test_a_layer_where_no_queued_task_is_sensitive_keeps_what_it_has() -> None:
    """The paper's skip rule; code minds layer 0 alone, talk minds both."""
    profile = profile_of(agreement_GL=[[0.5, 0.9], [0.5, 0.5]])
    asked = planner(profile=profile, period=2, min_agreement=0.85)
    asked.plan([Queued(TALK, 10)])
    assert resident(asked.plan([Queued(CODE, 10)])) == [[0, 1], [2, 3]]
    assert (asked.layers_changed, asked.layers_kept) == (3, 1)
    assert resident(asked.plan([Queued(CODE, 900), Queued(TALK, 1)])) == [[0, 1], [2, 3]]


def test_a_layer_whose_residents_serve_nearly_as_much_keeps_them() -> None:
    """With code's 2 and talk's 3 resident, a quarter of code's tokens is lost, and talk's more."""
    use_GLE = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2, [[0.5, 0.0, 0.45, 0.05]] * 2])
    for skip_loss, expected in ((0.0, [0, 2]), (0.47, [0, 2]), (0.48, [0, 1]), (1.0, [0, 1])):
        asked = planner(profile=profile_of(use_GLE=use_GLE), period=1, skip_loss=skip_loss)
        assert resident(asked.plan([Queued(CODE, 9)]))[0] == [0, 1]
        assert resident(asked.plan([Queued(TALK, 9)]))[0] == expected, skip_loss


def test_at_first_all_tasks_count_alike() -> None:
    assert resident(planner().resident_LE) == [[0, 2], [0, 2]]


class Recent(Popularity):
    """Says what the last finished request used: the simplest that remembers."""

    def with_history(self, history: Any) -> Any:
        view = Recent()
        view.spec, view.past = self.spec, history
        return view

    def on_request(self, state: Any, request: Any) -> Any:
        from predictors.base import Forecast

        (last_LE,) = self.past.before(self.past.num_finished, 1)
        return Forecast.stationary(last_LE, gamma=0.5)


def recent(spec: MoESpec = SPEC) -> Recent:
    predictor = Recent()
    predictor.spec = spec
    return predictor


def test_a_predictor_reads_the_finished_requests_of_each_task_apart() -> None:
    asked = planner(period=1, predictor=recent())
    uses_LE = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    assert resident(asked.plan([Queued(CODE, 9)])) == [[0, 1], [0, 1]]  # the profile's
    asked.finished(CODE, uses_LE)
    assert resident(asked.plan([Queued(CODE, 9)])) == [[2, 3], [2, 3]]
    asked.finished(CODE, uses_LE.flip(1))
    assert resident(asked.plan([Queued(CODE, 9)])) == [[0, 1], [0, 1]]
    assert resident(asked.plan([Queued(TALK, 9)])) == [[2, 3], [2, 3]]  # still the profile's


def test_the_sequence_predictor_can_be_asked() -> None:
    predictor = Task(epochs=1, window=2, period=1, hidden_size=8, depth=1)
    stream_NLE = torch.rand(12, 2, 4, generator=torch.Generator().manual_seed(0))
    predictor.fit_streams(stream_NLE, stream_NLE[:4])
    predictor.spec = SPEC
    asked = planner(period=1, predictor=predictor)
    asked.finished(CODE, stream_NLE[0])
    found_LE = asked.plan([Queued(CODE, 9)])
    assert found_LE.sum(dim=1).tolist() == [2, 2]


def test_a_predictor_without_memory_or_of_another_model_is_refused() -> None:
    popular = Popularity()
    popular.spec = SPEC
    with pytest.raises(ValueError, match="'popularity' does not read finished requests"):
        planner(predictor=popular)
    other = MoESpec(model_id="o", num_experts=8, top_k=1, decoder_layers=(0, 1))
    with pytest.raises(ValueError, match="fitted for another model"):
        planner(predictor=recent(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period=0"),
        ({"skip_loss": 1.5}, "skip_loss=1.5"),
        ({"skip_loss": math.nan}, "skip_loss=nan"),
        ({"min_agreement": -0.1}, "min_agreement=-0.1"),
        ({"min_agreement": math.nan}, "min_agreement=nan"),
    ],
)
def test_values_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planner(**options)


@pytest.mark.parametrize("slots", [(2,), (2, 5), (0, 2)])
def test_slots_that_the_model_cannot_have_are_refused(slots: Any) -> None:
    with pytest.raises(ValueError, match=r"2 numbers in 1\.\.4"):
        ResidentPlanner(profile=profile_of(), slots=slots)
