"""Layer recall against counting by hand."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from data.router_inputs import RoutedTokens
from data.schema import MoESpec
from predictors.base import FitReport, Forecast, Moment, Predictor, Request, State
from predictors.layer_metrics import evaluate_layer_recall
from predictors.popularity import Popularity
from tests.predictors.fakes import random_traces

SPEC = MoESpec(model_id="fake", num_experts=6, top_k=2, decoder_layers=(0, 1, 2))


def routed(ids_LNK: Any) -> RoutedTokens:
    ids = torch.tensor(ids_LNK)
    num_tokens = ids.shape[1]
    return RoutedTokens(
        starts_N=torch.arange(num_tokens) == 0,
        token_ids_N=torch.arange(num_tokens),
        topk_expert_ids_LNK=ids,
        router_probs_LNE=torch.full((3, num_tokens, 6), 1 / 6),
        router_input_LND=None,
    )


class Scripted(Predictor):
    """Ranks experts 0, 1, 2, ... at every layer; says nothing of layer 2 two layers ahead."""

    kind: ClassVar[str] = "scripted"
    moments: ClassVar[frozenset[Moment]] = frozenset({"request", "layer"})

    def __init__(self) -> None:
        super().__init__()
        self.spec = SPEC

    def fit(self, traces: Any) -> FitReport:
        return FitReport(0, 0, 0.0)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        next_LE = torch.arange(6.0).expand(3, 6)  # expert 5 first
        state.forecast = Forecast.stationary(next_LE, gamma=0.5)
        return state.forecast

    def on_layer(
        self, state: State, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> Tensor | None:
        if layer == 2:
            return None
        said_THE = -torch.arange(6.0).expand(1, 2, 6).clone()
        said_THE[:, 1] = torch.nan
        return said_THE

    def config(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def load_state(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec


def test_recall_is_counted_per_target_layer_and_lookahead() -> None:
    #           layer 0            layer 1            layer 2
    batch = routed([[[5, 4], [5, 0]], [[0, 1], [0, 5]], [[4, 5], [2, 3]]])
    report = evaluate_layer_recall(Scripted(), [batch])
    assert report["num_tokens"] == 2
    assert report["by_layer"]["1"] == [None, 3 / 4, 0.0]
    assert report["by_lookahead"]["1"] == pytest.approx(3 / 8)
    # Layer 2 uses 4 5 and 2 3: with the first 4 experts fetched, the latter are there.
    assert report["overfetch"]["1"] == pytest.approx(
        {"2": 3 / 8, "3": (3 + 1) / 8, "4": (3 + 2) / 8, "5": (3 + 3) / 8, "6": 1.0}
    )
    assert report["by_layer"]["2"] == [None, None, 0.0]
    assert report["silent"] == {"0": 0.0, "1": 0.0, "2": 1.0}
    assert report["before_token"]["by_layer"] == [3 / 4, 1 / 4, 2 / 4]


def test_batches_add_up() -> None:
    one = routed([[[5, 4]], [[0, 1]], [[4, 5]]])
    other = routed([[[5, 0]], [[0, 5]], [[2, 3]]])
    report = evaluate_layer_recall(Scripted(), [one, other])
    assert report["by_layer"]["1"] == [None, 3 / 4, 0.0]
    assert evaluate_layer_recall(Scripted(), [one, other], max_tokens=1)["num_tokens"] == 1


def test_nothing_to_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token to judge"):
        evaluate_layer_recall(Scripted(), [])


def test_a_predictor_that_never_speaks_of_layers_is_refused() -> None:
    predictor = Popularity()
    predictor.fit(random_traces())
    with pytest.raises(ValueError, match="'popularity' does not speak layer by layer"):
        evaluate_layer_recall(predictor, [routed([[[0, 1]], [[0, 1]], [[0, 1]]])])
