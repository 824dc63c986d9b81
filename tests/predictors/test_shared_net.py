"""The shared rule reads one expert's past, wherever that started, and learns from it."""

import numpy as np
import pytest
import torch

from data.schema import Trace
from predictors.fit.shared_net import fit_shared_net
from predictors.shared_net import (
    NUM_FEATURES,
    SharedNet,
    distances_TLE,
    features_of,
    learn,
    rule_of,
    rule_tensors,
)
from predictors.token_history import History, histories_of
from tests.predictors.fakes import make_trace, random_traces

POPULAR_LE = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
START_LE = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])


def features_from(start_LE: torch.Tensor, trace: Trace) -> torch.Tensor:
    past_NRLE, _ = histories_of(trace, start_LE, 1)
    nothing_LE = torch.zeros_like(start_LE)
    return features_of(past_NRLE, shift=nothing_LE, start=START_LE, num_tokens=torch.tensor(0))


def test_a_past_that_started_elsewhere_is_as_if_it_had_not() -> None:
    trace = random_traces(num_requests=1)[0]
    started_NLEJ = features_from(START_LE, trace)
    past_NRLE, _ = histories_of(trace, POPULAR_LE, 1)
    moved_NLEJ = features_of(
        past_NRLE,
        shift=START_LE - POPULAR_LE,
        start=START_LE,
        num_tokens=torch.arange(len(past_NRLE))[:, None, None],
    )
    assert moved_NLEJ.shape == (41, 2, 4, NUM_FEATURES)
    torch.testing.assert_close(moved_NLEJ, started_NLEJ, rtol=0, atol=1e-4)
    assert not torch.allclose(features_from(POPULAR_LE, trace), started_NLEJ)  # the control


def test_one_layer_alone_has_the_features_that_it_has_among_all() -> None:
    trace = random_traces(num_requests=1)[0]
    history = History(POPULAR_LE, 1)
    for t in range(5):
        map_LE = torch.from_numpy(trace.expert_map_LE(t, 4))
        history.add(map_LE, token_id=None, next_token_id=None)
    map_LE = torch.from_numpy(trace.expert_map_LE(5, 4))
    alone = [
        features_of(
            history.after_RE(layer, map_LE[layer]),
            shift=START_LE[layer] - POPULAR_LE[layer],
            start=START_LE[layer],
            num_tokens=torch.tensor(6),
        )
        for layer in (0, 1)
    ]
    torch.testing.assert_close(
        torch.stack(alone), features_from(START_LE, trace)[6], rtol=0, atol=1e-4
    )


def test_distances_count_from_before_a_token_to_the_next_use() -> None:
    use_TLE = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 0]])[:, None] > 0
    expected = [[2, 1], [1, torch.inf], [2, torch.inf], [1, torch.inf]]
    assert distances_TLE(use_TLE)[:, 0].tolist() == expected


def test_it_learns_that_what_was_used_is_used_again() -> None:
    """Each request stays with one expert; which one differs, so only a rule for all can know."""
    rng = np.random.default_rng(0)
    traces = [make_trace(f"r{n}", [int(rng.integers(4))] * 30) for n in range(20)]
    net = fit_shared_net(traces, (2, 4), 1, [0.9], seed=0)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    said = net(features_from(START_LE, make_trace("new", [2] * 20))[5:20]).sigmoid()
    assert float(said[:, :, 2].min()) > 0.8  # it will be used by the next token, and so soon
    assert float(said[:, :, [0, 1, 3], 0].max()) < 0.1


def test_the_same_seed_fits_the_same_and_leaves_the_callers_draws_alone() -> None:
    traces = random_traces().traces
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    once, twice, other = (
        fit_shared_net(traces, (2, 4), 1, [0.7, 0.9], seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(once.say.weight, twice.say.weight)
    assert not torch.equal(once.say.weight, other.say.weight)


def test_it_learns_on_from_less_than_what_has_no_next_use_yet() -> None:
    net = SharedNet(num_discounts=1)
    before = net.say.weight.detach().clone()
    learn(
        net,
        torch.optim.Adam(net.parameters()),
        torch.zeros(1, 2, 4, NUM_FEATURES),
        torch.zeros(1, 2, 4, dtype=torch.bool),
        discounts=[0.9],
        num_steps=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert not torch.equal(net.say.weight, before)
    assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())


def test_what_an_artifact_holds_makes_the_same_rule() -> None:
    net = fit_shared_net(random_traces().traces, (2, 4), 1, [0.9], seed=0)
    again = rule_of(rule_tensors(net), num_discounts=1)
    assert again is not None
    features = torch.rand(3, NUM_FEATURES)
    assert torch.equal(net(features), again(features))
    assert rule_tensors(None) == {}
    with pytest.raises(RuntimeError, match="size mismatch"):
        rule_of(rule_tensors(net), num_discounts=2)
