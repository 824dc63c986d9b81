import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.schema import Trace
from predictors.base import Request
from predictors.finemoe import FineMoE
from predictors.trajectory import Trajectory
from tests.predictors.fakes import WordEmbedder
from tests.predictors.maps import NUM_KINDS, SPEC, make_trace, make_traces, random_traces

MAKERS: dict[str, Callable[..., Trajectory]] = {
    "trajectory": Trajectory,
    "finemoe": lambda **options: FineMoE(embedder=WordEmbedder(), **options),
}


def fitted(traces: Any = None, **options: Any) -> Trajectory:
    predictor = Trajectory(**options)
    predictor.fit(random_traces() if traces is None else traces)
    return predictor


def maps_of(trace: Trace) -> Tensor:
    return torch.stack(
        [
            torch.from_numpy(trace.expert_map_LE(t, SPEC.num_experts))
            for t in range(trace.num_tokens)
        ]
    )


def said_by_layer(predictor: Trajectory, maps_TLE: Tensor) -> list[Tensor | None]:
    """`on_layer` of every layer, the tokens routed together."""
    state = predictor.new_state()
    return [
        predictor.on_layer(state, layer, None, maps_TLE[:, layer])
        for layer in range(SPEC.num_layers)
    ]


def test_each_layer_is_told_from_the_record_whose_map_began_most_alike() -> None:
    predictor = fitted(neighbours=1)
    maps_TLE = maps_of(make_trace("new", [0, 3, 1]))
    stored_NLE = predictor.tensors()["maps_NLE"].float()
    for layer, said_THE in enumerate(said_by_layer(predictor, maps_TLE)):
        assert said_THE is not None
        prefix = slice(0, layer + 1)
        cosine_TN = torch.nn.functional.cosine_similarity(
            maps_TLE[:, None, prefix].flatten(2), stored_NLE[None, :, prefix].flatten(2), dim=2
        )
        nearest_TLE = stored_NLE[cosine_TN.argmax(dim=1)]
        for ahead in range(1, 4):
            if layer + ahead < SPEC.num_layers:
                # Up to the tie-break by the store's mean, at most a thousandth.
                expected_TE = nearest_TLE[:, layer + ahead]
                assert torch.allclose(said_THE[:, ahead - 1], expected_TE, atol=1.1e-3)
            else:
                assert said_THE[:, ahead - 1].isnan().all()


def test_a_token_is_known_by_its_first_layers_where_the_mean_is_blind() -> None:
    predictor, trace = fitted(), make_trace("new", list(range(NUM_KINDS)) * 6)
    used_TLK = torch.from_numpy(trace.topk_expert_ids_TLK).long()
    mean = predictor.on_request(predictor.new_state(), Request())
    assert mean is not None
    told = blind = 0
    for layer, said_THE in enumerate(said_by_layer(predictor, maps_of(trace))[:-3]):
        assert said_THE is not None
        for t in range(trace.num_tokens):
            used_K = used_TLK[t, layer + 3]
            told += int(torch.isin(said_THE[t, 2].topk(2).indices, used_K).sum())
            blind += int(torch.isin(mean.next_LE[layer + 3].topk(2).indices, used_K).sum())
    num_slots = 3 * trace.num_tokens * SPEC.top_k
    assert blind < 0.5 * num_slots < 0.8 * num_slots < told


@pytest.mark.parametrize("name", MAKERS)
def test_layer_forecasts_see_no_later_layer_and_no_other_token(name: str) -> None:
    """A planted change in layers past l must not be seen at l; one in layer l must be."""
    predictor = MAKERS[name]()
    predictor.fit(random_traces())
    maps_TLE = maps_of(make_trace("new", [0, 3, 1, 2]))
    told = said_by_layer(predictor, maps_TLE)
    for layer in range(SPEC.num_layers - 1):
        other_TLE = maps_TLE.clone()
        other_TLE[:, layer + 1 :] = maps_TLE[:, layer + 1 :].flip(-1)
        other_TLE[1:] = maps_TLE[1:].flip(-1)
        again = said_by_layer(predictor, other_TLE)
        one, other = told[layer], again[layer]
        assert one is not None
        assert other is not None
        assert torch.equal(one[0].nan_to_num(-1), other[0].nan_to_num(-1))
        assert not torch.equal(one[1:].nan_to_num(-1), other[1:].nan_to_num(-1))


@pytest.mark.parametrize("name", MAKERS)
def test_layers_of_two_requests_in_turn_are_told_as_each_would_be_alone(name: str) -> None:
    """The released code matches every request with the first one's history."""
    predictor = MAKERS[name]()
    predictor.fit(random_traces())
    maps = [maps_of(make_trace(f"new{n}", [n])) for n in range(2)]
    alone = [said_by_layer(predictor, maps_1LE) for maps_1LE in maps]
    states = [predictor.new_state() for _ in maps]
    for layer in range(SPEC.num_layers):
        for n, state in enumerate(states):
            said = predictor.on_layer(state, layer, None, maps[n][:, layer])
            expected = alone[n][layer]
            assert said is not None
            assert expected is not None
            assert torch.equal(said.nan_to_num(-1), expected.nan_to_num(-1))


def test_targets_are_the_layers_at_the_prefetch_distance_alone() -> None:
    predictor = fitted(prefetch_distance=2)
    state = predictor.new_state()
    predictor.on_request(state, Request())
    assert predictor.plan(state) == []
    for layer, row_1E in enumerate(maps_of(make_trace("new", [0])).transpose(0, 1)):
        predictor.on_layer(state, layer, None, row_1E)
        targets = {item.layer for item in predictor.plan(state, layer_now=layer)}
        assert targets == set(range(max(2, layer + 1), min(layer + 3, SPEC.num_layers)))


def test_before_layer_0_the_mean_of_the_store_is_said() -> None:
    predictor = fitted(make_traces({"fit": [make_trace("a", [0, 0, 1])]}))
    forecast = predictor.on_request(predictor.new_state(), Request())
    assert forecast is not None
    expected_LE = maps_of(make_trace("a", [0, 0, 1])).mean(dim=0)
    assert torch.allclose(forecast.next_LE, expected_LE, atol=1e-3)
    assert torch.allclose(forecast.forecast_LE, 20 * expected_LE, atol=2e-2)


def test_layers_must_come_in_order_and_layer_0_begins_anew() -> None:
    predictor, rows = fitted(), maps_of(make_trace("new", [0])).transpose(0, 1)
    state = predictor.new_state()
    with pytest.raises(ValueError, match="layer=1: .* 0 is next"):
        predictor.on_layer(state, 1, None, rows[1])
    predictor.on_layer(state, 0, None, rows[0])
    with pytest.raises(ValueError, match="layer=2: .* 1 is next"):
        predictor.on_layer(state, 2, None, rows[2])
    first = predictor.on_layer(state, 0, None, rows[0])
    assert first is not None
    assert predictor.on_layer(state, 1, None, rows[1]) is not None


def test_an_empty_store_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    traces = make_traces({"test": [make_trace("a", [0, 1, 2])]})
    with caplog.at_level(logging.WARNING):
        predictor = fitted(traces)
    assert "empty" in caplog.text
    assert set(predictor.walk(traces[0]).forecasts) == {None}
    assert said_by_layer(predictor, maps_of(traces[0])) == [None] * SPEC.num_layers


def test_a_request_whose_probabilities_are_not_finite_is_named() -> None:
    bad = make_trace("bad", [0, 1])
    assert bad.router_probs_TLE is not None
    bad.router_probs_TLE[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="'bad'.*NaN"):
        fitted(make_traces({"fit": [make_trace("good", [0]), bad]}))


def test_traces_that_recorded_the_used_experts_alone_give_sparse_maps() -> None:
    """With and without their probabilities; one request is enough to fit on."""
    whole = make_trace("a", [0, 1, 2])
    ids_TLK = whole.topk_expert_ids_TLK.astype(int)
    probs_TLK = np.take_along_axis(whole.router_probs_TLE, ids_TLK, axis=-1)
    for probs in (probs_TLK, None):
        sparse = replace(whole, router_probs_TLE=None, topk_probs_TLK=probs)
        predictor = fitted(make_traces({"fit": [sparse]}), neighbours=1)
        said = said_by_layer(predictor, maps_of(sparse))[0]
        assert said is not None
        found_TK = said[:, 0].topk(SPEC.top_k).indices.sort().values
        assert found_TK.tolist() == np.sort(ids_TLK[:, 1]).tolist()


def test_prefetching_further_than_the_model_is_deep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefetch_distance=7: must be in 1\.\.6"):
        fitted(prefetch_distance=7)


@pytest.mark.parametrize("option", ["capacity", "prefetch_distance", "neighbours"])
def test_options_out_of_range_are_named(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0"):
        Trajectory(**{option: 0})
