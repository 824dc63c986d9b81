"""The device counts what the host's statistics count, token by token."""

import numpy as np
import pytest
import torch

from runtime.split_budget import SplitStatistics
from runtime.split_counts import SplitCounts

L, E, K, TOKENS = 3, 9, 2, 40


@pytest.mark.parametrize("with_guesses", [True, False])
def test_counts_are_those_of_the_host(with_guesses: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = SplitCounts(
        num_layers=L,
        num_experts=E,
        top_k=K,
        device=torch.device("cpu"),
        with_guesses=with_guesses,
    )
    theirs = SplitStatistics(num_layers=L, num_experts=E, top_k=K)
    with pytest.raises(ValueError, match="needs one in each"):
        ours.layers()
    for _ in range(TOKENS):
        # Few values, so that there are ties.
        keep_LE = torch.randint(0, 4, (L, E), generator=generator).float()
        said_LE = torch.randint(0, 4, (L, E), generator=generator).float()
        used_LE = torch.zeros(L, E).bool()
        used_LE.scatter_(1, torch.rand(L, E, generator=generator).topk(K).indices, True)
        if ours.said_LE is not None:
            ours.said_LE.copy_(said_LE)
        ours.add(keep_LE, used_LE)
        for layer in range(L):
            theirs.add(
                layer,
                priority_E=keep_LE[layer].double().numpy(),
                used_E=used_LE[layer].numpy(),
                said_E=said_LE[layer].double().numpy(),
            )
    assert ours.num_tokens == TOKENS
    for left, right in zip(ours.layers(), theirs.layers(), strict=True):
        assert np.array_equal(left.hit_C, right.hit_C)
        assert left.top_k == right.top_k
        if with_guesses:
            assert np.array_equal(left.right_Y, right.right_Y)
            assert np.array_equal(left.cached_YC, right.cached_YC)
        else:
            assert not left.right_Y.any()
            assert not left.cached_YC.any()
    ours.reset()
    assert ours.num_tokens == 0
