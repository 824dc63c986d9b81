"""Trains the forecaster's shared rule on recorded routing, as it will meet it while serving.

Requests are walked in their order, each starting from what those before it used. So few weights
need few tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.schema import Trace
from predictors.follower import start_of
from predictors.request_history import RequestHistory
from predictors.shared_net import SharedNet, features_of, learn
from predictors.token_history import USE_ROW, histories_of

_TOKENS = 8192  # of the first requests
_STEPS = 300
_LEARNING_RATE = 5e-3
_SAMPLE = 256  # tokens that tell the features' means and deviations


def fit_shared_net(
    traces: Sequence[Trace],
    shape_LE: Sequence[int],
    top_k: int,
    discounts: Sequence[float],
    *,
    seed: int,
) -> SharedNet:
    """Train the rule; returns it with its parameters frozen.

    Args:
        traces: At least one token in all.
        shape_LE: L and E.
        top_k: K.
        discounts: G of them.
        seed: Of initialisation and order.
    """
    history = RequestHistory()
    features: list[Tensor] = []
    uses: list[Tensor] = []
    for trace in traces:
        if sum(map(len, uses)) >= _TOKENS:
            break
        known = history.before(history.num_finished, history.capacity)
        start_LE = start_of(known, shape_LE, top_k)
        # Copies are not read, so they need not be looked for.
        past_NRLE, _ = histories_of(replace(trace, token_ids_P=None), start_LE, top_k)
        nothing_LE = torch.zeros_like(start_LE)
        features_TLEJ = features_of(
            past_NRLE[:-1], shift=nothing_LE, start=start_LE, num_tokens=torch.tensor(0)
        )
        features.append(features_TLEJ.half())
        uses.append(past_NRLE[1:, USE_ROW] > 0)
        history.add_trace(trace, shape_LE[1])
    features_TLEJ = torch.cat(features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SharedNet(num_discounts=len(discounts))
    sample = features_TLEJ[:: max(1, len(features_TLEJ) // _SAMPLE)].float().flatten(0, -2)
    net.norm_J2.copy_(torch.stack([sample.mean(0), sample.std(0).clamp_min(1e-3)], dim=-1))
    learn(
        net,
        torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE),
        features_TLEJ,
        torch.cat(uses),
        discounts=discounts,
        num_steps=_STEPS,
        generator=torch.Generator().manual_seed(seed),
    )
    return net.requires_grad_(False)
