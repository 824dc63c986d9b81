"""Gate context: the attention in blocks against a loop over tokens, and what a token may see."""

import pytest
import torch
from torch import Tensor

from predictors.gate_context import TokenContext, turned, unit_length

STARTS_N = torch.tensor([n in (0, 7, 8) for n in range(19)])
REQUESTS = [range(7), range(7, 8), range(8, 19)]
EMBEDDED_ND = unit_length(torch.randn(19, 6, generator=torch.Generator().manual_seed(0)))


def trained(window: int) -> TokenContext:
    """With weights that matter."""
    generator = torch.Generator().manual_seed(1)
    context = TokenContext(size=6, window=window)
    for parameter in context.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return context.requires_grad_(requires_grad=False)


def one_by_one(context: TokenContext, n: int, seen: range) -> Tensor:
    """Token n's context, from the definition: a softmax over the tokens of its window."""
    heads = []
    for head, distance_W in enumerate(context.distance_AW):
        query_C, value_TV = (
            (rows @ weight).unflatten(-1, (len(context.distance_AW), -1))[..., head, :]
            for rows, weight in (
                (EMBEDDED_ND[n], context.query),
                (EMBEDDED_ND[list(seen)], context.value),
            )
        )
        keys_TC = (EMBEDDED_ND[list(seen)] @ context.key).unflatten(-1, (4, -1))[:, head]
        at_query = turned(unit_length(query_C)[None], torch.tensor([n]))
        scores_T = (turned(unit_length(keys_TC), torch.tensor(list(seen))) @ at_query[0]) / 32**0.5
        scores_T = scores_T + distance_W[[n - m for m in seen]]
        heads.append(scores_T.softmax(0) @ value_TV)
    return unit_length(EMBEDDED_ND[n] + torch.cat(heads) @ context.out)


@pytest.mark.parametrize("window", [1, 2, 5, 8, 40])
def test_blocks_say_what_a_loop_over_tokens_says(window: int) -> None:
    context = trained(window)
    found_ND = context(EMBEDDED_ND, STARTS_N)
    for rows in REQUESTS:
        for n in rows:
            expected_D = one_by_one(context, n, range(max(rows[0], n - window + 1), n + 1))
            torch.testing.assert_close(found_ND[n], expected_D, rtol=1e-4, atol=1e-5)


def test_where_a_window_begins_in_the_row_does_not_matter() -> None:
    """A request that goes on feeds its latest tokens, a batch feeds whole requests."""
    context = trained(4)
    whole_ND = context(EMBEDDED_ND, STARTS_N)
    for n in range(11, 19):
        latest_ND = context(EMBEDDED_ND[n - 3 : n + 1], STARTS_N[n - 3 : n + 1])
        torch.testing.assert_close(latest_ND[-1], whole_ND[n])


def test_later_tokens_and_other_requests_change_nothing() -> None:
    context = trained(8)
    other_ND = EMBEDDED_ND.clone()
    other_ND[:8] = 1.0
    other_ND[15:] = -1.0
    one, other = context(EMBEDDED_ND, STARTS_N), context(other_ND, STARTS_N)
    assert torch.equal(one[8:15], other[8:15])
    assert not torch.allclose(one[15:], other[15:])


def test_untrained_it_is_the_embedding() -> None:
    found_ND = TokenContext(size=6, window=4)(EMBEDDED_ND, STARTS_N)
    torch.testing.assert_close(found_ND, EMBEDDED_ND, rtol=1e-4, atol=1e-5)


def test_zeros_have_no_direction() -> None:
    assert not unit_length(torch.zeros(2, 4, dtype=torch.bfloat16)).any()
    torch.testing.assert_close(unit_length(3 * torch.ones(4)), torch.ones(4))
