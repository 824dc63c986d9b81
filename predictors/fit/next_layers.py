"""Fits `predictors.next_layers` on recorded routing, beside a fitted predictor's forecasts.

Ways are learned on the "fit" requests; how much the forecasts themselves are to be believed on the
"val" requests, which they have not been fitted on. How far ahead a token is looked at is drawn, so
that one set of ways serves all distances; near ones are drawn more often, since they tell most.

Shape letters: N tokens · B of a batch · L MoE layers · E experts per layer (X, of the layer that
has routed) · D layers that are told of it · K experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.schema import Split, Trace, TraceSet
from predictors.base import Predictor
from predictors.next_layers import DEPTH, NextLayers, base_log_odds, told_log_odds
from predictors.routing import expert_use_TLE, traces_of

_BATCH = 256
_LEARNING_RATE = 1e-2
_WEIGHT_DECAY = 0.1
_EPOCHS = 2
_CALIBRATION_STEPS = 60


class _Tokens(NamedTuple):
    next_NLE: Tensor  # float32, what was expected of each
    use_NLE: Tensor  # float32, what it used


def fit_next_layers(
    predictor: Predictor,
    traces: TraceSet,
    *,
    depth: int = DEPTH,
    max_tokens: int = 30_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> NextLayers | None:
    """Learn what a token's layers say beside the predictor's forecast of it.

    Args:
        predictor: Fitted; its `walk` is what tokens were expected to use.
        traces: The split "val" may be empty: then the "fit" requests stand in for it.
        depth: D.
        max_tokens: Of either split; requests are taken as evenly as they lie.
        seed: Of order and distances.
        device: Where it trains.

    Returns:
        On the CPU; None for a model of one layer, or without a token that was forecast.
    """
    num_layers = traces.spec.num_layers
    splits: tuple[Split, Split] = ("fit", "val" if "val" in traces.split.values() else "fit")
    told, judged = (_tokens(predictor, traces, split, max_tokens, device) for split in splits)
    if num_layers < 2 or not len(told.use_NLE):
        return None
    generator = torch.Generator().manual_seed(seed)
    depth = min(depth, num_layers - 1)
    mean_LE = told.use_NLE.mean(0)
    E = mean_LE.shape[1]
    way_LXDE = torch.zeros(num_layers, E, depth, E, device=device, requires_grad=True)
    scale_L = torch.ones(num_layers, device=device, requires_grad=True)
    bias_LE = torch.zeros(num_layers, E, device=device, requires_grad=True)

    def loss_of(tokens: _Tokens, rows_B: Tensor) -> Tensor:
        nearest_B = (depth * torch.rand(len(rows_B), generator=generator) ** 2).ceil().clamp(min=1)
        use_BLE = tokens.use_NLE[rows_B]
        log_odds_BLE = base_log_odds(tokens.next_NLE[rows_B], scale_L, bias_LE)
        log_odds_BLE = log_odds_BLE + told_log_odds(
            use_BLE - mean_LE, way_LXDE, nearest_B.to(device)
        )
        return F.binary_cross_entropy_with_logits(log_odds_BLE, use_BLE)

    ours = [scale_L, bias_LE]
    with torch.enable_grad():
        groups = [
            {"params": [way_LXDE], "weight_decay": _WEIGHT_DECAY},
            {"params": ours, "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE)
        num_batches = max(1, len(told.use_NLE) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=_EPOCHS * num_batches + 1
        )
        for _ in range(_EPOCHS):
            order_N = torch.randperm(len(told.use_NLE), generator=generator)
            for rows_B in order_N.tensor_split(num_batches):
                _step(optimizer, loss_of(told, rows_B))
                schedule.step()
        way_LXDE.requires_grad_(False)  # what is left is calibrated over it as it is
        optimizer = torch.optim.Adam(ours, lr=_LEARNING_RATE)
        for _ in range(_CALIBRATION_STEPS):
            rows_B = torch.randint(len(judged.use_NLE), (2 * _BATCH,), generator=generator)
            _step(optimizer, loss_of(judged, rows_B))
    # A mean routing is to add nothing: every row gives up its share of what it would.
    by_mean_LDE = torch.einsum("lx,lxde->lde", mean_LE, way_LXDE.detach())
    centred_LXDE = way_LXDE.detach() - by_mean_LDE[:, None] / traces.spec.top_k
    # An artifact holds halves: what is judged is what is served.
    return NextLayers(
        way_LXDE=centred_LXDE.half(), scale_L=scale_L.half(), bias_LE=bias_LE.half()
    ).cpu()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _tokens(
    predictor: Predictor,
    traces: TraceSet,
    split: Split,
    max_tokens: int,
    device: torch.device | str,
) -> _Tokens:
    """Some of a split's tokens, and what was expected of each before it was routed."""
    next_NLE, use_NLE = [], []
    for trace in _evenly(list(traces_of(traces, split)), max_tokens):
        forecasts = predictor.walk(trace).forecasts
        known = np.array([forecast is not None for forecast in forecasts])
        next_NLE += [forecast.next_LE for forecast in forecasts if forecast is not None]
        use_NLE.append(torch.from_numpy(expert_use_TLE(trace, traces.spec.num_experts)[known]))
    if not next_NLE:
        empty = torch.zeros(0, traces.spec.num_layers, traces.spec.num_experts)
        return _Tokens(empty, empty)
    return _Tokens(torch.stack(next_NLE).float().to(device), torch.cat(use_NLE).float().to(device))


def _evenly(requests: Sequence[Trace], max_tokens: int) -> Sequence[Trace]:
    """Every n-th request, so that there are about so many tokens."""
    num_tokens = sum(trace.num_tokens for trace in requests)
    return requests[:: max(1, -(-num_tokens // max_tokens))]
