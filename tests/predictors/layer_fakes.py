"""A tiny bound model with its router inputs, for predictors that speak layer by layer."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from data.router_inputs import LiveInputs, RoutedTokens
from tests.families import tiny_model

FAMILY = "qwen3_moe"


@lru_cache
def model(family: str = FAMILY) -> Any:
    """Random weights; 3 MoE layers (2 of deepseek_v3)."""
    return tiny_model(family)


@lru_cache
def inputs(family: str = FAMILY, seed: int = 0) -> LiveInputs:
    """Requests of random tokens, a few of which are frequent."""
    rng = np.random.default_rng(seed)
    favourites = rng.dirichlet(np.full(128, 0.2))
    token_ids: Any = {
        split: [rng.choice(128, 24, p=favourites) for _ in range(count)]
        for split, count in {"fit": 24, "val": 6, "test": 6}.items()
    }
    return LiveInputs(model(family), token_ids, max_batch_tokens=200)


def tokens(family: str = FAMILY) -> RoutedTokens:
    """The first batch of the test requests."""
    return next(inputs(family).batches("test"))


def with_other_future(tokens: RoutedTokens, n: int, layer: int) -> RoutedTokens:
    """The same up to layer ``layer`` of token ``n``; everything after that is something else.

    The ids of tokens up to ``n`` stay: a token's id is known before it is routed.
    """
    generator = torch.Generator().manual_seed(0)
    inputs_LND, probs_LNE = tokens.router_input_LND, tokens.router_probs_LNE
    assert inputs_LND is not None
    is_later_LN = torch.zeros(inputs_LND.shape[:2], dtype=torch.bool)
    is_later_LN[:, n + 1 :] = True
    is_later_LN[layer + 1 :, n] = True
    noise_LND = torch.randn(inputs_LND.shape, generator=generator)
    noise_LNE = torch.rand(probs_LNE.shape, generator=generator).softmax(-1)
    other_ids_N = (tokens.token_ids_N + 1) % 128
    later_N = torch.arange(len(other_ids_N)) > n
    return RoutedTokens(
        starts_N=tokens.starts_N,
        token_ids_N=torch.where(later_N, other_ids_N, tokens.token_ids_N),
        topk_expert_ids_LNK=tokens.topk_expert_ids_LNK,
        router_probs_LNE=torch.where(is_later_LN[..., None], noise_LNE, probs_LNE),
        router_input_LND=torch.where(is_later_LN[..., None], noise_LND, inputs_LND),
    )
