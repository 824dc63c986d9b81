"""Lossy batches: residents change between groups of sequences, and never while one runs."""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from data.adapters import spec_of
from runtime.engine import attach
from runtime.resident_planner import Queued, ResidentPlanner
from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Piece
from tests.predictors.task_profiles import profile_of
from tests.runtime.server.fakes import Listener, request, wait_until

PREFIX = "The quick brown fox jumps over the lazy dog, again and again. " * 10  # some pages
ENDS = ("def f(x):", "def main():", "hello there,", "def g():", "hello you", "hello, how are")
PROMPTS = [PREFIX + end for end in ENDS]
GROUP = 3
GREEDY = SamplingParams(temperature=0.0)


class Watched(ResidentPlanner):
    """Remembers the tasks that each decision was for."""

    def plan(self, queue: Sequence[Queued]) -> Tensor:
        self.__dict__.setdefault("seen", []).append([queued.task for queued in queue])
        return super().plan(queue)


def ask(
    model: Any, tokenizer: Any, *, mode: Any, group: int | None, planner: ResidentPlanner
) -> list[list[int]]:
    """The token ids that all prompts, asked at once, are answered with."""
    scores_LE = planner.resident_LE.float()
    with attach(model, mode="resident_only", slots=16, resident_scores_LE=scores_LE) as offload:
        engine = GenerationEngine(
            model=model, tokenizer=tokenizer, offload=offload, mode=mode, group_requests=group
        )
        offload.plan_residents(planner, waiting=engine.waiting_prompts)
        listeners = [Listener() for _ in PROMPTS]
        for prompt, listener in zip(PROMPTS, listeners, strict=True):
            ids = tokenizer(prompt).input_ids
            engine.submit(
                [request(ids, prompt_text=prompt, sampling=GREEDY, max_tokens=6)], listener
            )
        engine.start()
        said = [
            [piece.token_id for piece in listener.until_end() if isinstance(piece, Piece)]
            for listener in listeners
        ]
        wait_until(lambda: engine.num_running == 0)
        engine.shutdown()
        assert offload.stats().misses == 0
    return said


def watched(model: Any, *, period: int) -> Watched:
    spec = spec_of(model)
    profile = profile_of(spec=spec)
    return Watched(profile=profile, slots=(16,) * spec.num_layers, period=period, skip_loss=0.0)


def test_each_group_has_a_decision_for_all_of_it(model: Any, tokenizer: Any) -> None:
    planner = watched(model, period=GROUP)
    ask(model, tokenizer, mode="batched", group=GROUP, planner=planner)
    code, talk = 0, 1
    assert planner.__dict__["seen"] == [[code, code, talk], [code, talk, talk]]


def test_answers_of_a_batch_are_those_of_single_sequences_with_the_same_residents(
    model: Any, tokenizer: Any
) -> None:
    """Prefixes that an earlier group computed with other residents would show here."""
    alone = ask(model, tokenizer, mode="single", group=None, planner=watched(model, period=GROUP))
    together = ask(
        model, tokenizer, mode="batched", group=GROUP, planner=watched(model, period=GROUP)
    )
    assert together == alone


def test_without_groups_nothing_changes_while_somebody_runs(model: Any, tokenizer: Any) -> None:
    planner = watched(model, period=1)
    ask(model, tokenizer, mode="batched", group=None, planner=planner)
    assert len(planner.__dict__["seen"]) == 1


def test_a_group_has_somebody_in_it(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="group_requests=0"):
        GenerationEngine(model=model, tokenizer=tokenizer, group_requests=0)
