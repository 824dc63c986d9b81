"""How far each member of a blend is to be trusted, learned from what came true.

Knows rows of what members said and what happened; nothing of predictors or traces' files.

Shape letters: M members · L MoE layers · E experts per layer · T tokens · R rows: tokens for which
every member had a forecast · N entries of a layer, R x E.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from predictors.base import Walked
from predictors.token_use import log_odds


class Rows(NamedTuple):
    """What the members said of "val" tokens, and what came true.

    Attributes:
        next_MRLE, later_MRLE, routed_MRLE: Of each member: next use; use after that as told before
            the token; the same as told once the layer had routed it.
        used_RLE: 1 where the token used the expert.
        future_RLE: Use after this token in the unit of ``later``: as if the request went on as it
            did until its end.
        weight_R: Share of the discounted future that was recorded.
    """

    next_MRLE: Tensor
    later_MRLE: Tensor
    routed_MRLE: Tensor
    used_RLE: Tensor
    future_RLE: Tensor
    weight_R: Tensor


def rows_of(walked: Sequence[Walked], use_TLE: Tensor, kept: Sequence[int], gamma: float) -> Rows:
    """Rows ``kept`` of one request."""
    num_tokens = len(use_TLE)
    future_TLE, mass_T = torch.zeros_like(use_TLE), torch.zeros(num_tokens)
    for t in range(num_tokens - 2, -1, -1):
        future_TLE[t] = gamma * (use_TLE[t + 1] + future_TLE[t + 1])
        mass_T[t] = gamma * (1.0 + mass_T[t + 1])
    full = max(gamma / (1.0 - gamma), 1e-9)
    rows = torch.tensor(kept)
    share_R = mass_T[rows] / full
    said = [[one.forecasts[t] for t in kept] for one in walked]
    next_MRLE = torch.stack([torch.stack([f.next_LE for f in of if f is not None]) for of in said])
    later_MRLE = torch.stack(
        [torch.stack([f.forecast_LE - f.next_LE for f in of if f is not None]) for of in said]
    )
    routed_MRLE = torch.stack(
        [
            later_RLE if one.later_TLE is None else one.later_TLE[rows]
            for one, later_RLE in zip(walked, later_MRLE, strict=True)
        ]
    )
    future_RLE = future_TLE[rows] / share_R.clamp(min=1e-9)[:, None, None]
    return Rows(next_MRLE, later_MRLE, routed_MRLE, use_TLE[rows], future_RLE, share_R)


def pool_log_odds(next_MRLE: Tensor, used_RLE: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Weights [M, L], bias [L], and the log loss of each member and then of the blend."""
    # Only fitting needs it, so a serving process never loads it.
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped,unused-ignore]

    num_members, _, num_layers, _ = next_MRLE.shape
    odds_MRLE = log_odds(next_MRLE)
    weights_ML, bias_L = torch.zeros(num_members, num_layers), torch.zeros(num_layers)
    losses = torch.zeros(num_members + 1, num_layers)
    for layer in range(num_layers):
        odds_NM = odds_MRLE[:, :, layer].flatten(1).T
        used_N = used_RLE[:, layer].flatten()
        candidates = [(torch.eye(num_members)[m], torch.tensor(0.0)) for m in range(num_members)]
        if 0 < used_N.sum() < len(used_N):  # else every expert is used by every token
            fitted = LogisticRegression(C=1.0).fit(odds_NM.numpy(), used_N.numpy())
            weights_M = torch.from_numpy(fitted.coef_[0].astype(np.float32))
            candidates.append((weights_M, torch.tensor(float(fitted.intercept_[0]))))
        found = [
            float(nn.functional.binary_cross_entropy_with_logits(odds_NM @ w_M + b, used_N))
            for w_M, b in candidates
        ]
        best = int(np.argmin(found))
        weights_ML[:, layer], bias_L[layer] = candidates[best]
        losses[:num_members, layer] = torch.tensor(found[:num_members])
        losses[num_members, layer] = found[best]
    return weights_ML, bias_L, losses.mean(dim=1).tolist()


def least_squares(later_MRLE: Tensor, rows: Rows) -> Tensor:
    """Non-negative weights [M, L] whose sum of ``later`` is nearest to the true later use."""
    from sklearn.linear_model import LinearRegression  # type: ignore[import-untyped,unused-ignore]

    num_members, _, num_layers, num_experts = later_MRLE.shape
    weights_ML = torch.full((num_members, num_layers), 1.0 / num_members)
    weight_N = rows.weight_R.repeat_interleave(num_experts).numpy()
    if not weight_N.any():  # requests of one token have no later
        return weights_ML
    for layer in range(num_layers):
        later_NM = later_MRLE[:, :, layer].flatten(1).T.numpy()
        future_N = rows.future_RLE[:, layer].flatten().numpy()
        model = LinearRegression(positive=True, fit_intercept=False)
        found_M = model.fit(later_NM, future_N, sample_weight=weight_N).coef_
        if found_M.any():
            weights_ML[:, layer] = torch.from_numpy(found_M.astype(np.float32))
    return weights_ML
