"""Router reuse against the model's own routers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.errors import SpecMismatchError
from predictors.artifact import load_artifact, save_artifact
from predictors.base import Predictor
from predictors.router_reuse import RouterReuse
from tests.families import FAMILIES, tiny_model
from tests.predictors import layer_fakes
from tests.predictors.fakes import random_traces


def reuse(family: str = layer_fakes.FAMILY, *, lookahead: int = 2) -> RouterReuse:
    predictor = RouterReuse(lookahead=lookahead)
    predictor.bind(layer_fakes.model(family))
    predictor.fit_model()
    return predictor


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_layers_own_router_is_asked(family: str) -> None:
    """Its K highest are what that router's own forward chooses for this layer's input."""
    predictor, tokens = reuse(family), layer_fakes.tokens(family)
    assert tokens.router_input_LND is not None
    routers = [layer.mlp for layer in layer_fakes.model(family).model.layers]
    routers = [getattr(mlp, "gate", None) or getattr(mlp, "router", None) for mlp in routers]
    routers = [router for router in routers if hasattr(router, "weight")]
    top_k = predictor.fitted_spec().top_k
    said_NHE = predictor.on_layer(
        predictor.new_state(), 0, tokens.router_input_LND[0], tokens.router_probs_LNE[0]
    )
    assert said_NHE is not None
    assert said_NHE.shape[1] == 2
    chosen_NK = routers[1](tokens.router_input_LND[0])[2]
    assert torch.equal(said_NHE[:, 0].topk(top_k).indices.sort().values, chosen_NK.sort().values)
    beyond_NE = said_NHE[:, 1]
    assert bool(beyond_NE.isnan().all()) == (len(routers) == 2)


def test_the_first_layers_come_from_the_previous_tokens_last_input() -> None:
    predictor, tokens = reuse(), layer_fakes.tokens()
    assert tokens.router_input_LND is not None
    walked = predictor.walk_layers(tokens)
    assert bool(walked.before_NLE[tokens.starts_N].isnan().all())
    top_k = predictor.fitted_spec().top_k
    router = layer_fakes.model().model.layers[0].mlp.gate
    chosen_K = router(tokens.router_input_LND[-1, 4:5])[2][0]
    assert set(walked.before_NLE[5, 0].topk(top_k).indices.tolist()) == set(chosen_K.tolist())


@pytest.mark.parametrize("lookahead", [1, 2, 5])
def test_walking_at_once_says_what_walking_token_by_token_says(lookahead: int) -> None:
    predictor, tokens = reuse(lookahead=lookahead), layer_fakes.tokens()
    fast, slow = predictor.walk_layers(tokens), Predictor.walk_layers(predictor, tokens)
    torch.testing.assert_close(fast.before_NLE, slow.before_NLE, equal_nan=True)
    torch.testing.assert_close(fast.ahead_LNHE, slow.ahead_LNHE, equal_nan=True)


def test_recorded_traces_alone_say_nothing() -> None:
    predictor = reuse()
    state = predictor.new_state()
    map_LE = layer_fakes.tokens().router_probs_LNE[:, 0]
    assert predictor.on_token(state, map_LE, token_id=1, next_token_id=2) is None


def test_an_unbound_predictor_says_what_comes_first() -> None:
    with pytest.raises(ValueError, match=r"'router_reuse' .* bind\(model\) comes first"):
        RouterReuse().fit(random_traces())


def test_traces_of_another_model_are_refused() -> None:
    predictor = RouterReuse()
    predictor.bind(layer_fakes.model())
    with pytest.raises(SpecMismatchError, match=r"the traces' own model.*model="):
        predictor.fit(random_traces())


def test_another_checkpoint_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    predictor = reuse()
    save_artifact(predictor, tmp_path / "a", spec=predictor.fitted_spec(), parents={})
    loaded = load_artifact(tmp_path / "a")
    with pytest.raises(SpecMismatchError, match="another checkpoint"):
        loaded.bind(tiny_model(layer_fakes.FAMILY, seed=1))
    loaded.bind(layer_fakes.model())
    tokens = layer_fakes.tokens()
    one, other = predictor.walk_layers(tokens), loaded.walk_layers(tokens)
    assert torch.equal(one.ahead_LNHE.nan_to_num(), other.ahead_LNHE.nan_to_num())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="lookahead=0"):
        RouterReuse(lookahead=0)


def test_tokens_without_router_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="needs router inputs"):
        reuse().walk_layers(replace(layer_fakes.tokens(), router_input_LND=None))
