import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from predictors.base import Forecast, Request
from predictors.embedders.token_mean import TokenMeanEmbedder
from predictors.finemoe import FineMoE
from predictors.metrics import evaluate_recall
from predictors.trajectory import Trajectory
from tests.predictors.fakes import WordEmbedder
from tests.predictors.maps import (
    NUM_KINDS,
    SPEC,
    kind_logits,
    make_trace,
    make_traces,
    random_kinds,
    random_traces,
)

PAPER: dict[str, Any] = {"neighbours": 1}


def fitted(traces: Any = None, **options: Any) -> FineMoE:
    predictor = FineMoE(embedder=WordEmbedder(), **options)
    predictor.fit(random_traces() if traces is None else traces)
    return predictor


def first_experts(forecast: Forecast | None) -> list[int]:
    assert forecast is not None
    return forecast.next_LE.argmax(dim=1).tolist()


@pytest.mark.parametrize("distance", range(1, SPEC.num_layers + 1))
def test_the_two_searches_together_target_every_layer_once(distance: int) -> None:
    """The released code leaves out layer index d: its trajectory search starts at d + 1."""
    predictor, trace = fitted(prefetch_distance=distance), make_trace("new", [0, 1])
    state = predictor.new_state()
    predictor.on_request(state, Request.of(trace))
    for t in range(2):
        by_key = {item.layer for item in predictor.plan(state)}
        assert by_key == set(range(distance))
        covered = set(by_key)
        for layer in range(SPEC.num_layers):
            row_1E = torch.from_numpy(trace.expert_map_LE(t, SPEC.num_experts))[layer, None]
            predictor.on_layer(state, layer, None, row_1E)
            new = {item.layer for item in predictor.plan(state)} - covered
            assert new == ({layer + distance} if layer + distance < SPEC.num_layers else set())
            covered |= new
        assert covered == set(range(SPEC.num_layers))
        map_LE = torch.from_numpy(trace.expert_map_LE(t, SPEC.num_experts))
        predictor.on_token(state, map_LE, next_token_id=1)


def test_queued_experts_are_those_that_the_threshold_chose() -> None:
    """At least K a layer, far from all: the released code queues every expert of a window."""
    predictor, trace = fitted(**PAPER), make_trace("new", [0])
    state = predictor.new_state()
    predictor.on_request(state, Request.of(trace))
    map_LE = torch.from_numpy(trace.expert_map_LE(0, SPEC.num_experts))
    for layer in range(SPEC.num_layers):
        predictor.on_layer(state, layer, None, map_LE[layer, None])
    queued = predictor.plan(state)
    per_layer = np.bincount([item.layer for item in queued], minlength=SPEC.num_layers)
    assert per_layer.min() >= SPEC.top_k
    assert per_layer.max() < SPEC.num_experts
    assert [item.priority for item in queued] == sorted(
        (item.priority for item in queued), reverse=True
    )


def test_the_next_token_decides_what_its_first_layers_need() -> None:
    predictor = fitted(**PAPER)
    state = predictor.new_state()
    predictor.on_request(state, Request(prompt="cats"))
    map_LE = torch.full((SPEC.num_layers, SPEC.num_experts), 1 / SPEC.num_experts)
    for kind in range(NUM_KINDS):
        forecast = predictor.on_token(state, map_LE, next_token_id=kind)
        hits = np.mean(first_experts(forecast) == kind_logits()[kind].argmax(axis=1))
        assert hits > 0.6


def test_among_equal_tokens_the_prompt_decides() -> None:
    cats = make_trace("a", [0], prompt="cats")
    ships = replace(make_trace("b", [1], prompt="ships"), token_ids_P=np.zeros(1, np.int32))
    predictor = fitted(make_traces({"fit": [cats, ships]}), **PAPER)
    uniform_LE = torch.full((SPEC.num_layers, SPEC.num_experts), 1 / SPEC.num_experts)
    for prompt, trace in [("cats", cats), ("ships", ships)]:
        state = predictor.new_state()
        predictor.on_request(state, Request(prompt=prompt))
        forecast = predictor.on_token(state, uniform_LE, next_token_id=0)
        assert first_experts(forecast) == trace.topk_expert_ids_TLK[0, :, 0].tolist()


def test_an_unknown_token_widens_what_is_fetched() -> None:
    """Its similarity cannot pass the prompt's share, so delta is at least the token's."""
    predictor = fitted(token_weight=0.95, **PAPER)
    uniform_LE = torch.full((SPEC.num_layers, SPEC.num_experts), 1 / SPEC.num_experts)
    num_queued = {}
    for next_token_id in (0, NUM_KINDS + 1):
        state = predictor.new_state()
        predictor.on_request(state, Request(prompt="cats"))
        predictor.on_token(state, uniform_LE, next_token_id=next_token_id)
        num_queued[next_token_id] = len(predictor.plan(state))
    known, unknown = num_queued.values()
    assert known == 3 * SPEC.top_k
    assert unknown > known


def test_without_token_ids_the_prompt_is_searched_for_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = [
        make_trace("a", [0] * 3, prompt="cats", with_ids=False),
        make_trace("b", [1] * 3, prompt="ships", with_ids=False),
    ]
    predictor = fitted(make_traces({"fit": stored}))
    trace = make_trace("new", [0, 0, 0], prompt="ships", with_ids=False)
    with caplog.at_level(logging.WARNING):
        said = predictor.walk(trace).forecasts
    assert caplog.text.count("without id") == 1
    expected = kind_logits()[1].argmax(axis=1)
    assert np.mean(first_experts(said[0]) == expected) > 0.6
    assert first_experts(said[2]) == first_experts(said[0])


def test_without_any_key_the_mean_is_said_and_nothing_is_targeted() -> None:
    traces = random_traces(with_ids=False, prompt=None)
    predictor, trajectory = FineMoE(), Trajectory()
    for fitting in (predictor, trajectory):
        fitting.fit(traces)
    state = predictor.new_state()
    forecast = predictor.on_request(state, Request())
    mean = trajectory.on_request(trajectory.new_state(), Request())
    assert forecast is not None
    assert mean is not None
    assert torch.equal(forecast.next_LE, mean.next_LE)
    assert predictor.plan(state) == []


def test_walking_a_whole_trace_says_what_is_said_token_by_token() -> None:
    for online in (False, True):
        fast, slow = fitted(online=online), fitted(online=online)
        trace = make_trace("new", random_kinds(7))
        for one, other in zip(
            fast.walk(trace).forecasts, Trajectory.walk(slow, trace).forecasts, strict=True
        ):
            assert one is not None
            assert other is not None
            assert torch.equal(one.next_LE, other.next_LE)
            assert torch.equal(one.forecast_LE, other.forecast_LE)


def test_offline_the_evaluated_requests_are_not_in_the_store() -> None:
    """The released demo fills its store with the very prompts that it evaluates."""
    traces = random_traces()
    predictor = fitted(traces)
    before = {name: tensor.clone() for name, tensor in predictor.tensors().items()}
    evaluate_recall(predictor, traces)
    learned = predictor.tensors()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in before.items())
    assert len(learned["maps_NLE"]) == sum(
        trace.num_tokens for trace in traces.traces if traces.split[trace.request_id] == "fit"
    )
    for trace in traces.traces:
        held = [
            bool((learned["maps_NLE"] == torch.from_numpy(map_LE)).all(dim=(1, 2)).any())
            for map_LE in trace.router_probs_TLE  # type: ignore[union-attr]
        ]
        assert all(held) == any(held) == (traces.split[trace.request_id] == "fit")


def test_online_an_empty_store_says_nothing_at_first_and_learns_from_every_request() -> None:
    predictor = fitted(make_traces({"test": [make_trace("t", [0])]}), online=True)
    first = make_trace("first", [0, 1, 2])
    said = predictor.walk(first).forecasts
    assert said[0] is None
    assert all(forecast is not None for forecast in said[1:])
    # The last token of a replayed trace has no successor, so nobody says that it is finished.
    assert len(predictor.store) == 2
    state = predictor.new_state()
    assert predictor.on_request(state, Request(prompt="cats")) is not None
    uniform_LE = torch.full((SPEC.num_layers, SPEC.num_experts), 1 / SPEC.num_experts)
    forecast = predictor.on_token(state, uniform_LE, token_id=3, next_token_id=1)
    assert len(predictor.store) == 3
    assert np.mean(first_experts(forecast) == kind_logits()[1].argmax(axis=1)) > 0.6


def test_online_recall_grows_from_nothing_to_what_a_fitted_store_has() -> None:
    requests = [make_trace(f"t{n}", random_kinds(n), prompt="cats") for n in range(8)]
    predictor = fitted(make_traces({"val": []}), online=True, capacity=60)
    early = evaluate_recall(predictor, make_traces({"test": requests[:1]})).recall
    for n in range(1, 7):
        predictor.walk(requests[n])
    late = evaluate_recall(predictor, make_traces({"test": requests[7:]})).recall
    assert early + 0.1 < late
    assert len(predictor.store) == 60


def test_fitting_online_does_not_store_the_requests_that_it_is_calibrated_on() -> None:
    traces = random_traces()
    assert len(fitted(traces, online=True).store) == len(fitted(traces).store)


def test_the_models_own_embedding_tells_which_other_token_is_alike() -> None:
    embedder = TokenMeanEmbedder()
    ids = torch.arange(300, 308)
    rows_TS = embedder.embed_ids(ids)
    unseen = 307
    nearest = int((rows_TS[:-1] @ rows_TS[-1]).argmax())
    stored = [
        replace(make_trace(f"r{n}", [n % NUM_KINDS]), token_ids_P=np.array([int(ids[n])], np.int32))
        for n in range(7)
    ]
    predictor = FineMoE(embedder=embedder, token_key="embedding", token_weight=1.0, neighbours=1)
    predictor.fit(make_traces({"fit": stored}))
    state = predictor.new_state()
    predictor.on_request(state, Request(prompt="cats"))
    uniform_LE = torch.full((SPEC.num_layers, SPEC.num_experts), 1 / SPEC.num_experts)
    forecast = predictor.on_token(state, uniform_LE, next_token_id=unseen)
    assert first_experts(forecast) == stored[nearest].topk_expert_ids_TLK[0, :, 0].tolist()


def test_token_ids_of_another_tokenizer_are_refused_where_their_embedding_is_read() -> None:
    foreign = replace(make_trace("a", [0]), token_ids_P=np.array([2**31 - 1], np.int32))
    predictor = FineMoE(embedder=TokenMeanEmbedder(), token_key="embedding", capacity=1)
    with pytest.raises(ValueError, match="2147483647.*another tokenizer"):
        predictor.fit(make_traces({"fit": [foreign, replace(foreign, request_id="b")]}))


def test_embeddings_that_came_along_are_used_if_they_are_ours() -> None:
    """As collected by a store that embedded its prompts; a trace without text shows the use."""
    traces = random_traces()
    ours_S = WordEmbedder().embed(["cats"])[0]
    given = [replace(trace, prompt_embedding_S=ours_S) for trace in traces.traces]
    textless = [replace(trace, prompt=None) for trace in given]
    learned = fitted(traces).tensors()
    for with_embeddings in (given, textless):
        again = fitted(replace(traces, traces=with_embeddings)).tensors()
        assert all(torch.equal(tensor, again[name]) for name, tensor in learned.items())
    theirs = [replace(trace, prompt_embedding_S=-ours_S) for trace in traces.traces]
    with pytest.raises(ValueError, match="'r0'.*'words'"):
        fitted(replace(traces, traces=theirs))


def test_an_embedding_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(7,\).*'words' makes \(3,\)"):
        fitted().on_request(
            fitted().new_state(), Request(prompt_embedding_S=np.zeros(7, np.float32))
        )


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"token_key": "text"}, "token_key='text'"),
        ({"token_key": "embedding"}, "'token_mean'.*not 'words'"),
        ({"token_weight": -0.1}, "token_weight=-0.1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FineMoE(embedder=WordEmbedder(), **option)
