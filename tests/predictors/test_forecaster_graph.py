"""Inside a graph the forecaster says what it says token by token on the host."""

import copy
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.schema import Trace
from predictors.base import Request
from predictors.forecaster import Forecaster
from predictors.forecaster_graph import ForecasterGraph
from predictors.token_history import COPY_MIN_MATCH, COPY_WINDOW, NUM_PAST
from tests.devices import INTERPRETED, KERNEL_DEVICE
from tests.launches import Launches
from tests.predictors.fakes import SPEC, random_traces

SMALL: dict[str, Any] = {
    "hidden_dim": 32,
    "epochs": 4,
    "batch_size": 32,
    "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
}
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
COPIES = slice(NUM_PAST, NUM_PAST + len(COPY_MIN_MATCH))


@pytest.fixture(scope="module")
def fitted() -> Forecaster:
    predictor = Forecaster(**SMALL, num_nets=2)
    predictor.fit(random_traces(num_requests=24))
    return predictor


@pytest.fixture(scope="module")
def trace(fitted: Forecaster) -> Trace:
    """Ids that repeat, so that there is something to copy, one of them never fitted."""
    trace = random_traces(num_requests=1, num_tokens=30, seed=5)[0]
    ids_T = np.random.default_rng(0).integers(0, 3, trace.num_tokens + trace.first_routed_position)
    ids_T[7] = 10**6
    return replace(trace, token_ids_P=ids_T.astype(np.int32))


def maps_and_ids(trace: Trace) -> tuple[torch.Tensor, torch.Tensor]:
    maps = [trace.expert_map_LE(t, SPEC.num_experts) for t in range(trace.num_tokens)]
    assert trace.token_ids_P is not None
    ids_T = trace.token_ids_P[trace.first_routed_position :].astype(np.int64)
    return torch.from_numpy(np.stack(maps)), torch.from_numpy(ids_T)


def begun(predictor: Forecaster, batch_size: int = 1) -> ForecasterGraph:
    # On tensors of the CPU, kernels run by the interpreter only.
    graph = predictor.graph_module(batch_size=batch_size, kernels=INTERPRETED)
    graph.begin()
    return graph


def routed(graph: ForecasterGraph, layer: int, probs_BE: torch.Tensor) -> torch.Tensor:
    """Show a layer's routing as a router gives it."""
    probs_BK, ids_BK = probs_BE.topk(SPEC.top_k)
    return graph.on_routed(layer, ids_BK, probs_BK)


def test_every_forecast_of_a_request_is_the_same(fitted: Forecaster, trace: Trace) -> None:
    state, graph = fitted.new_state(), begun(fitted)
    said = fitted.on_request(state, Request())
    maps_TLE, ids_T = maps_and_ids(trace)
    for t in range(len(ids_T) - 1):
        assert said is not None
        torch.testing.assert_close(graph.next_LE, said.next_LE, **CLOSE)
        torch.testing.assert_close(graph.forecast_LE, said.forecast_LE, **CLOSE)
        for layer in range(SPEC.num_layers):
            later_E = fitted.on_routed(state, layer, maps_TLE[t, layer])
            torch.testing.assert_close(
                routed(graph, layer, maps_TLE[None, t, layer]), later_E, **CLOSE
            )
        token, upcoming = int(ids_T[t]), int(ids_T[t + 1])
        said = fitted.on_token(state, maps_TLE[t], token_id=token, next_token_id=upcoming)
        graph.on_token(maps_TLE[None, t], ids_T[t : t + 1], ids_T[t + 1 : t + 2])
    assert graph.rows_BRLE[:, COPIES].any(), "nothing was copied: the comparison says little"


def test_without_ids_it_goes_by_routing_alone(fitted: Forecaster, trace: Trace) -> None:
    state, graph = fitted.new_state(), begun(fitted)
    fitted.on_request(state, Request())
    maps_TLE, _ = maps_and_ids(trace)
    nothing_B = torch.tensor([-1])
    for map_LE in maps_TLE:
        said = fitted.on_token(state, map_LE)
        graph.on_token(map_LE[None], nothing_B, nothing_B)
    assert said is not None
    torch.testing.assert_close(graph.forecast_LE, said.forecast_LE, **CLOSE)
    assert not graph.rows_BRLE[:, COPIES].any()
    assert graph.rows_BRLE[:, COPIES.stop :].any(), "echoes need no ids"


@pytest.mark.parametrize("num_tokens", [1, 2, 20])
def test_a_prompt_at_once_is_its_tokens_one_by_one(
    fitted: Forecaster, trace: Trace, num_tokens: int
) -> None:
    one_by_one, at_once = begun(fitted), begun(fitted)
    maps_TLE, ids_T = maps_and_ids(trace)
    for t in range(num_tokens):
        one_by_one.on_token(maps_TLE[None, t], ids_T[t : t + 1], ids_T[t + 1 : t + 2])
    at_once.on_prompt(
        maps_TLE[None, :num_tokens], ids_T[None, :num_tokens], ids_T[num_tokens : num_tokens + 1]
    )
    for t in range(num_tokens, len(ids_T) - 1):  # and neither forgets anything that matters later
        torch.testing.assert_close(at_once.forecast_LE, one_by_one.forecast_LE, **CLOSE)
        for graph in (one_by_one, at_once):
            graph.on_token(maps_TLE[None, t], ids_T[t : t + 1], ids_T[t + 1 : t + 2])


def test_rows_of_a_batch_have_a_past_each_and_are_averaged(
    fitted: Forecaster, trace: Trace
) -> None:
    alone = [begun(fitted), begun(fitted)]
    together = begun(fitted, batch_size=2)
    maps_TLE, ids_T = maps_and_ids(trace)
    for t in range(10):
        rows = [t, t + 12]
        for graph, row in zip(alone, rows, strict=True):
            graph.on_token(maps_TLE[None, row], ids_T[None, row], ids_T[None, row + 1])
        nexts = [row + 1 for row in rows]
        together.on_token(maps_TLE[rows], ids_T[rows], ids_T[nexts])
    mean_LE = torch.stack([graph.forecast_LE for graph in alone]).mean(0)
    torch.testing.assert_close(together.forecast_LE, mean_LE, **CLOSE)
    for layer in range(SPEC.num_layers):
        routed_BE = maps_TLE[[20, 21], layer]
        each = [routed(graph, layer, routed_BE[b, None]) for b, graph in enumerate(alone)]
        torch.testing.assert_close(
            routed(together, layer, routed_BE), torch.stack(each).mean(0), **CLOSE
        )


def test_beginning_again_forgets_everything(fitted: Forecaster, trace: Trace) -> None:
    graph = begun(fitted)
    first_LE = graph.forecast_LE.clone()
    maps_TLE, ids_T = maps_and_ids(trace)
    for t in range(5):
        graph.on_token(maps_TLE[None, t], ids_T[None, t], ids_T[None, t + 1])
    assert not torch.equal(graph.forecast_LE, first_LE)
    graph.begin()
    assert torch.equal(graph.forecast_LE, first_LE)
    assert (graph.ids_BW < 0).all()


def test_what_layers_have_shown_is_the_token(fitted: Forecaster, trace: Trace) -> None:
    by_map, by_layer = begun(fitted), begun(fitted)
    maps_TLE, ids_T = maps_and_ids(trace)
    for t in range(5):
        for layer in range(SPEC.num_layers):
            routed(by_layer, layer, maps_TLE[None, t, layer])
        by_layer.on_token(None, ids_T[None, t], ids_T[None, t + 1])
        by_map.on_token(maps_TLE[None, t], ids_T[None, t], ids_T[None, t + 1])
        torch.testing.assert_close(by_layer.forecast_LE, by_map.forecast_LE, **CLOSE)


def test_a_window_that_has_gone_round_forgets_its_oldest_place(fitted: Forecaster) -> None:
    """The same places in another order: what counts is how long ago they were."""
    torch.manual_seed(0)
    num_tokens = COPY_WINDOW + 40
    maps_BTLE = torch.rand(1, num_tokens, SPEC.num_layers, SPEC.num_experts)
    ids_BT = torch.randint(0, 3, (1, num_tokens + 1))
    at_once, one_by_one = begun(fitted), begun(fitted)
    at_once.on_prompt(maps_BTLE, ids_BT[:, :-1], ids_BT[:, -1])
    one_by_one.on_prompt(
        maps_BTLE[:, :COPY_WINDOW], ids_BT[:, :COPY_WINDOW], ids_BT[:, COPY_WINDOW]
    )
    for t in range(COPY_WINDOW, num_tokens):
        one_by_one.on_token(maps_BTLE[:, t], ids_BT[:, t], ids_BT[:, t + 1])
    assert int(one_by_one.slot_of_place_W[0]) == 40
    torch.testing.assert_close(
        one_by_one.rows_BRLE[:, NUM_PAST:], at_once.rows_BRLE[:, NUM_PAST:], **CLOSE
    )


def test_a_layer_is_one_launch_and_a_token_few(fitted: Forecaster) -> None:
    one_net = copy.copy(fitted)
    one_net.nets = fitted.nets[:1]
    graph, kernels = begun(one_net), []
    graph._later_use = lambda **tensors: kernels.append(tensors)
    ids_1K, probs_1K = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    row_E, token_1 = torch.zeros(SPEC.num_experts), torch.tensor([1])
    with Launches() as launches:
        graph.on_routed(0, ids_1K, probs_1K, row_E)
    assert (len(kernels), launches.count) == (1, 0)
    with Launches() as launches:
        graph.on_token(None, token_1, token_1)
    assert launches.count <= 68


def test_in_torch_alone_it_says_the_same(fitted: Forecaster, trace: Trace) -> None:
    maps_TLE, ids_T = (part.to(KERNEL_DEVICE) for part in maps_and_ids(trace))
    said = []
    for kernels in (True, False):
        graph = fitted.graph_module(batch_size=1, kernels=kernels).to(KERNEL_DEVICE)
        graph.begin()
        later = []
        for t in range(4):
            for layer in range(SPEC.num_layers):
                later.append(routed(graph, layer, maps_TLE[None, t, layer]))
            graph.on_token(None, ids_T[None, t], ids_T[None, t + 1])
        said.append(torch.stack([*later, *graph.forecast_LE]))
    torch.testing.assert_close(*said, **CLOSE)


def test_without_triton_kernels_are_refused_at_once(
    fitted: Forecaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "predictors.kernels.later_use", raising=False)
    with pytest.raises(ImportError, match="kernels=False"):
        fitted.graph_module(batch_size=1)
    fitted.graph_module(batch_size=1, kernels=False).begin()
