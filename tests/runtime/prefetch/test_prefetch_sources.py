"""What the next layers need, said on the device: by a forecast, or by their own routers."""

import pytest
import torch

from data.adapters import moe_layers, spec_of
from data.routers import Routers
from predictors.router_reuse import RouterReuse
from runtime.prefetch.sources import NextRouters, Now, TokenForecast
from tests.families import FAMILIES, tiny_model


def test_a_forecast_is_read_when_asked_and_counts_all_tokens() -> None:
    next_LE = torch.zeros(2, 4)
    source = TokenForecast(next_LE)
    next_LE[1] = torch.tensor([0.0, 0.5, 1.0, 0.1])
    assert torch.equal(source.next_HE(range(1, 2), Now(-1, 1)), next_LE[1:])
    torch.testing.assert_close(
        source.next_HE(range(1, 2), Now(0, 3))[0], torch.tensor([0.0, 0.875, 1.0, 1 - 0.9**3])
    )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_routers_say_what_the_predictor_says_of_what_experts_are_given(
    family: str,
) -> None:
    """What an experts module is given is what its router was given, in every family."""
    model = tiny_model(family)
    layers, spec = moe_layers(model), spec_of(model)
    inputs: dict[str, list[torch.Tensor]] = {"router": [], "experts": []}
    handles = [
        hook
        for moe in layers
        for hook in (
            moe.router.register_forward_hook(
                lambda _, args, out: inputs["router"].append(args[0].flatten(0, -2))
            ),
            moe.experts.register_forward_hook(
                lambda _, args, out: inputs["experts"].append(args[0].flatten(0, -2))
            ),
        )
    ]
    model(torch.tensor([[3, 1, 4]]))
    for handle in handles:
        handle.remove()
    for router_TD, experts_TD in zip(inputs["router"], inputs["experts"], strict=True):
        assert torch.equal(router_TD, experts_TD)
    predictor = RouterReuse(lookahead=1)
    predictor.bind(model)
    predictor.fit_model()
    state = predictor.new_state()
    source = NextRouters(Routers(model), top_k=spec.top_k)
    input_TD = inputs["experts"][0]
    probs_THE = predictor.on_layer(state, 0, input_TD, torch.empty(0))
    assert probs_THE is not None
    each_TE = (spec.top_k * probs_THE[:, 0]).clamp(max=1)
    for rows in (input_TD[:1], input_TD):
        (said_E,) = source.next_HE(range(1, 2), Now(0, len(rows), rows))
        torch.testing.assert_close(said_E, 1 - (1 - each_TE[: len(rows)]).prod(0))
        assert said_E.dtype == torch.float32


def test_the_next_routers_say_nothing_of_what_they_cannot_know() -> None:
    model = tiny_model("mixtral")
    source = NextRouters(Routers(model), top_k=2)
    assert source.next_HE(range(2), Now(-1, 1)) is None
    assert source.next_HE(range(2, 3), Now(0, 1, torch.zeros(1, 32))) is None
    ahead_HE = source.next_HE(range(1, 3), Now(0, 1, torch.randn(1, 32)))
    assert ahead_HE[0].any()
    assert not ahead_HE[1].any()
    with pytest.raises(ValueError, match="lookahead=0: must be at least 1"):
        NextRouters(Routers(model), top_k=2, lookahead=0)
