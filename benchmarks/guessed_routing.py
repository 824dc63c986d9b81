"""Guesses of the next layer where a recorded routing is replayed: no hidden states, no routers.

What a predictor from hidden states would say cannot be known there. `recalled_scores` stands for
one: it names K experts, of which as many are right as the predictor was measured to find. It is
made from the recorded future; what is right about it is how often it is wrong.

Shape letters: N replayed tokens · L MoE layers · E experts per layer · K experts per token.
"""

import torch
from torch import Tensor

from benchmarks.replay_testbed import ReplayTestbed
from runtime.prefetch.sources import Now


def recalled_scores(ids_NLK: Tensor, num_experts: int, *, recall: float, seed: int = 0) -> Tensor:
    """What a predictor of this recall might say: float32 [N, L, E], K positive scores a layer.

    Each used expert is found with probability ``recall``; the others of the K named are drawn from
    those that are not used. The K are ordered at random. Layer 0, which a reused router knows only
    from the token before, gets that token's experts; of the first token nothing is said there.

    Args:
        ids_NLK: The truth, int64.
        num_experts: E.
        recall: In [0, 1].
        seed: Of the draws.

    Raises:
        ValueError: The recall is out of range.
    """
    if not 0 <= recall <= 1:
        raise ValueError(f"recall={recall}: must be in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_layers, top_k = ids_NLK.shape
    used_NLE = torch.zeros(num_tokens, num_layers, num_experts).scatter_(2, ids_NLK.cpu(), 1.0)
    found_NLK = torch.rand(ids_NLK.shape, generator=generator) < recall
    found_NLE = torch.zeros_like(used_NLE).scatter_(2, ids_NLK.cpu(), found_NLK.float())
    # Found ones stand above 2, unused ones above 1, used ones that were not found below.
    rank_NLE = torch.rand(used_NLE.shape, generator=generator) + 2 * found_NLE + (1 - used_NLE)
    named_NLK = rank_NLE.topk(top_k).indices
    order_NLK = torch.rand(ids_NLK.shape, generator=generator).clamp_(min=1e-6)
    scores_NLE = torch.zeros_like(used_NLE).scatter_(2, named_NLK, order_NLK)
    scores_NLE[0, 0], scores_NLE[1:, 0] = 0.0, used_NLE[:-1, 0]
    return scores_NLE


def random_scores(num_tokens: int, num_layers: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Any order of all experts, for each token and layer anew: float32 [N, L, E]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num_tokens, num_layers, num_experts, generator=generator)
    return drawn.clamp_(min=1e-6)


class ToldScores:
    """A `runtime.prefetch.sources.Source` that says what has been made up for each token.

    Args:
        testbed: What is decoded, one row.
        scores_NLE: For each of its tokens.
    """

    def __init__(self, testbed: ReplayTestbed, scores_NLE: Tensor) -> None:
        self._scores_NLE = scores_NLE.to(testbed.device)
        self._position_1 = testbed.forced.position_1

    def next_HE(self, layers: range, now: Now) -> Tensor:
        """As `Source.next_HE`."""
        scores_NHE = self._scores_NLE[:, layers.start : layers.stop]
        return scores_NHE.index_select(0, self._position_1)[0]
