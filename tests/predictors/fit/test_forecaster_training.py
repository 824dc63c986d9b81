"""The examples that the forecaster is trained on, and training them on several devices."""

from typing import Any

import numpy as np
import pytest
import torch

from predictors.fit.forecaster import examples_of
from predictors.forecaster import Forecaster
from predictors.metrics import evaluate_recall
from predictors.token_history import NUM_PAST
from tests.predictors.fakes import make_trace
from tests.predictors.test_forecaster import SMALL, periodic_traces


def test_a_distance_counts_the_tokens_to_the_next_use_also_into_the_next_request() -> None:
    traces = [make_trace("a", [0, 1, 0]), make_trace("b", [1, 3])]
    examples = examples_of(traces, torch.full((2, 4), 0.25), 1, {0: 0, 1: 1})
    distance_NE = examples.distance_NLE[:, 0].tolist()
    # Three rows and one more of "a", whose last looks into "b"; then "b"'s own.
    assert [row[0] for row in distance_NE[:3]] == [1, 2, 1]
    assert [row[1] for row in distance_NE] == [2, 1, 2, 1, 1, 30_000, 30_000]
    assert [row[3] for row in distance_NE] == [5, 4, 3, 2, 2, 1, 30_000]
    assert distance_NE[0][2] == 30_000
    assert examples.examples_M.tolist() == [0, 1, 2, 4, 5]
    assert examples.tokens_N3[:, 1].tolist() == [2, 0, 1, 0, 2, 1, 2]


def test_each_request_starts_with_an_empty_past() -> None:
    traces = [make_trace("a", [0, 1, 0]), make_trace("b", [1, 3])]
    examples = examples_of(traces, torch.full((2, 4), 0.25), 1, {})
    assert examples.past_NRLE.shape == (7, NUM_PAST, 2, 4)
    assert torch.equal(examples.past_NRLE[0], examples.past_NRLE[4])
    assert not torch.equal(examples.past_NRLE[3], examples.past_NRLE[4])
    assert not examples.copies_NRLE[[0, 3, 4, 6]].any()


def test_it_trains_on_several_devices() -> None:
    settings: dict[str, Any] = {**SMALL["trainer"], "devices": 2, "strategy": "ddp_spawn"}
    traces = periodic_traces()
    predictor = Forecaster(**{**SMALL, "trainer": settings})
    predictor.fit(traces)
    assert evaluate_recall(predictor, traces).recall > 0.95


def test_targets_are_the_experts_that_ran() -> None:
    """A router steered by biases may run others than those of its highest probabilities."""
    probs_TLE = np.tile(np.array([0.7, 0.1, 0.1, 0.1], np.float16), (2, 2, 1))
    steered = make_trace("steered", [2, 3], router_probs_TLE=probs_TLE)
    examples = examples_of([steered], torch.full((2, 4), 0.25), 1, {})
    assert examples.distance_NLE[0, 0].tolist() == [30_000, 30_000, 1, 2]


def test_a_loss_that_is_not_finite_is_said() -> None:
    with pytest.raises(ValueError, match=r"lower learning_rate=1e\+30"):
        Forecaster(**{**SMALL, "learning_rate": 1e30}).fit(periodic_traces())


@pytest.mark.gpu
def test_a_gpu_learns_the_same_from_captured_steps_each_time() -> None:
    settings = {**SMALL["trainer"], "accelerator": "gpu"}
    traces = periodic_traces()
    fitted = [Forecaster(**{**SMALL, "trainer": settings}) for _ in range(2)]
    for predictor in fitted:
        predictor.fit(traces)
    assert evaluate_recall(fitted[0], traces).recall > 0.95
    again = fitted[1].tensors()
    assert all(torch.equal(tensor, again[n]) for n, tensor in fitted[0].tensors().items())
