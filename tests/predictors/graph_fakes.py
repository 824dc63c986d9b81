"""Predictors for graphs: one that is the same on the host to the bit, one that learned nothing."""

from typing import Any

import torch
from torch import Tensor

from data.schema import MoESpec
from predictors.base import Forecast, Request, State
from predictors.calibrate import Calibration
from predictors.forecaster import Forecaster
from predictors.forecaster_net import ForecasterNet
from predictors.graph import GraphPredictor
from predictors.token_history import top_k_map
from tests.fakes import ScriptedPredictor

KEPT = 0.75  # of the past, per token; sums of such numbers are exact for a while
ID_STEP = 2.0**-7  # what a token's id adds: who is shown other ids, forecasts otherwise


class Habit(ScriptedPredictor):
    """Expects the last token's map next, and afterwards an average of all maps, and of ids."""

    kind = "habit"
    moments = frozenset({"request", "token", "routed"})

    def __init__(self) -> None:
        super().__init__(gamma=0.8)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        spec = self.fitted_spec()
        zeros_LE = torch.zeros(spec.num_layers, spec.num_experts)
        state.forecast = Forecast(zeros_LE, zeros_LE)
        return state.forecast

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast | None:
        assert state.forecast is not None
        state.num_tokens += 1
        past_LE = state.forecast.forecast_LE - state.forecast.next_LE
        shift_E = torch.arange(past_LE.shape[1]) * ID_STEP
        shown = (-1 if token_id is None else token_id) + 3 * (next_token_id or 0)
        map_LE, _ = top_k_map(expert_map_LE, self.fitted_spec().top_k)
        later_LE = KEPT * past_LE + (1 - KEPT) * map_LE + (shown % 5) * shift_E
        state.forecast = Forecast(torch.zeros_like(later_LE), later_LE)
        return state.forecast

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        assert state.forecast is not None
        used_K = router_probs_E.topk(self.fitted_spec().top_k).indices
        used_E = torch.zeros_like(router_probs_E).scatter_(0, used_K, 1.0)
        return state.forecast.forecast_LE[layer] + 2.0 * used_E

    def graph_module(self, *, batch_size: int, **options: Any) -> GraphPredictor:
        spec = self.fitted_spec()
        return HabitGraph(batch_size, spec)


class HabitGraph(GraphPredictor):
    """The same for B rows."""

    past_BLE: Tensor
    map_BLE: Tensor
    shift_E: Tensor

    def __init__(self, batch_size: int, spec: MoESpec) -> None:
        super().__init__()
        self._top_k = spec.top_k
        shape_LE = (spec.num_layers, spec.num_experts)
        self.register_buffer("next_LE", torch.zeros(shape_LE))
        self.register_buffer("forecast_LE", torch.zeros(shape_LE))
        self.register_buffer("past_BLE", torch.zeros(batch_size, *shape_LE))
        self.register_buffer("map_BLE", torch.zeros(batch_size, *shape_LE))
        self.register_buffer("shift_E", torch.arange(spec.num_experts) * ID_STEP)

    def begin(self) -> None:
        self.past_BLE.zero_()
        self.forecast_LE.zero_()

    def on_token(
        self, expert_map_BLE: Tensor | None, token_ids_B: Tensor, next_token_ids_B: Tensor
    ) -> None:
        if expert_map_BLE is not None:
            self.map_BLE.copy_(top_k_map(expert_map_BLE, self._top_k)[0])
        shown_B = (token_ids_B + 3 * next_token_ids_B).remainder(5)
        self.past_BLE.mul_(KEPT).add_((1 - KEPT) * self.map_BLE)
        self.past_BLE.add_(shown_B[:, None, None] * self.shift_E)
        self.forecast_LE.copy_(self.past_BLE.mean(0))

    def on_routed(
        self,
        layer: int,
        topk_expert_ids_BK: Tensor,
        topk_probs_BK: Tensor,
        out_E: Tensor | None = None,
    ) -> Tensor:
        used_BE = torch.zeros_like(self.past_BLE[:, layer])
        used_BE.scatter_(1, topk_expert_ids_BK, 1.0)
        probs_BK = topk_probs_BK / topk_probs_BK.sum(-1, keepdim=True)
        self.map_BLE[:, layer] = torch.zeros_like(used_BE).scatter(1, topk_expert_ids_BK, probs_BK)
        later_E = (self.past_BLE[:, layer] + 2.0 * used_BE).mean(0)
        return later_E if out_E is None else out_E.copy_(later_E)


def untrained_forecaster(spec: MoESpec, *, hidden_dim: int = 32) -> Forecaster:
    """Random weights: neither what it costs nor where it says the same depends on them."""
    torch.manual_seed(0)
    known_ids_V = torch.arange(50)
    predictor = Forecaster(hidden_dim=hidden_dim)
    net = ForecasterNet(
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        num_tokens=len(known_ids_V),
        num_discounts=len(predictor.discounts),
        hidden_dim=hidden_dim,
        dropout=predictor.dropout,
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    predictor.load_state(
        spec,
        {
            "token_ids_V": known_ids_V,
            "popularity_LE": torch.full((spec.num_layers, spec.num_experts), 0.1),
            **Calibration.identity().tensors(),
            **{f"nets.0.{name}": tensor.half() for name, tensor in net.state_dict().items()},
        },
    )
    return predictor
