"""Gate MLP: where it starts, what it may see, that it gains, that it comes back from disk."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import SpecMismatchError
from data.features import write_features
from data.router_inputs import LiveInputs, RoutedTokens
from data.schema import MoESpec, Split
from predictors.artifact import load_artifact, save_artifact
from predictors.base import Predictor, Request
from predictors.gate_losses import LOSSES
from predictors.gate_mlp import GateMLP
from predictors.layer_metrics import evaluate_layer_recall
from predictors.router_reuse import RouterReuse
from tests.families import tiny_model
from tests.predictors import layer_fakes
from tests.predictors.fakes import random_traces

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SMALL: dict[str, Any] = {"width": 32, "steps": 60, "lookahead": 2, "trainer": QUIET}


def unfitted(family: str = layer_fakes.FAMILY, **changed: Any) -> GateMLP:
    predictor = GateMLP(**(SMALL | changed))
    predictor.bind(layer_fakes.model(family))
    return predictor


def untrained(family: str = layer_fakes.FAMILY, **changed: Any) -> GateMLP:
    """As it is before the first step."""
    return fitted(family, steps=1, learning_rate=1e-30, **changed)


@lru_cache
def fitted(family: str = layer_fakes.FAMILY, **changed: Any) -> GateMLP:
    predictor = unfitted(family, **changed)
    predictor.fit_inputs(layer_fakes.inputs(family))
    return predictor


def reuse(family: str = layer_fakes.FAMILY) -> RouterReuse:
    predictor = RouterReuse(lookahead=2)
    predictor.bind(layer_fakes.model(family))
    predictor.fit_model()
    return predictor


class Planted:
    """Router inputs in memory, to be tampered with."""

    def __init__(self, **batches: list[RoutedTokens]) -> None:
        self.spec: MoESpec = layer_fakes.inputs().spec
        self._batches = batches

    def batches(self, split: Split, *, seed: int | None = None) -> Iterator[RoutedTokens]:
        yield from self._batches.get(split, [])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_an_untrained_one_is_router_reuse(family: str) -> None:
    tokens = layer_fakes.tokens(family)
    mine = untrained(family).walk_layers(tokens).ahead_LNHE
    base = reuse(family).walk_layers(tokens).ahead_LNHE
    torch.testing.assert_close(mine, base, equal_nan=True)


@pytest.mark.parametrize("variant", ["residual", "independent"])
def test_walking_at_once_says_what_walking_token_by_token_says(variant: str) -> None:
    predictor, tokens = fitted(variant=variant), layer_fakes.tokens()
    fast, slow = predictor.walk_layers(tokens), Predictor.walk_layers(predictor, tokens)
    torch.testing.assert_close(fast.before_NLE, slow.before_NLE, equal_nan=True)
    torch.testing.assert_close(fast.ahead_LNHE, slow.ahead_LNHE, equal_nan=True)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_said_depends_on_what_has_happened_alone(layer: int) -> None:
    """Planted: from the next layer of token 10 on, everything is something else."""
    predictor, tokens = fitted(), layer_fakes.tokens()
    told = predictor.walk_layers(tokens)
    other = predictor.walk_layers(layer_fakes.with_other_future(tokens, 10, layer))
    torch.testing.assert_close(told.before_NLE[:11], other.before_NLE[:11])
    for ahead in (told.ahead_LNHE, other.ahead_LNHE):
        ahead.nan_to_num_(0.0)
    torch.testing.assert_close(told.ahead_LNHE[:, :10], other.ahead_LNHE[:, :10])
    torch.testing.assert_close(told.ahead_LNHE[: layer + 1, 10], other.ahead_LNHE[: layer + 1, 10])
    assert not torch.allclose(told.ahead_LNHE[:, 11], other.ahead_LNHE[:, 11])
    if layer == 0:
        assert not torch.allclose(told.ahead_LNHE[1, 10], other.ahead_LNHE[1, 10])


def test_a_prompts_pass_reads_nothing_of_tokens_on_their_way() -> None:
    """All tokens of a prompt pass a layer together: their predecessors' later layers are open."""
    predictor, tokens = fitted(), layer_fakes.tokens()
    inputs_LND = tokens.router_input_LND
    assert inputs_LND is not None
    said = []
    for length in (1, 6):
        state = predictor.new_state()
        predictor.on_request(state, Request(token_ids_P=tokens.token_ids_N[:6].int().numpy()))
        said.append(
            predictor.on_layer(
                state, 0, inputs_LND[0, :length], tokens.router_probs_LNE[0, :length]
            )
        )
    assert said[0] is not None
    assert said[1] is not None
    assert said[1].shape[0] == 6
    torch.testing.assert_close(said[0], said[1][:1], equal_nan=True)


def test_fitting_gains_on_requests_that_it_has_not_seen() -> None:
    test = list(layer_fakes.inputs().batches("test"))
    base = evaluate_layer_recall(reuse(), test)
    mine = evaluate_layer_recall(fitted(steps=200), test)
    assert mine["by_lookahead"]["1"] > base["by_lookahead"]["1"] + 0.02
    # Layer 0 of random weights follows the token's embedding closely.
    assert mine["before_token"]["by_layer"][0] > base["before_token"]["by_layer"][0] + 0.1


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_no_target_ends_below_its_base_on_val(loss: str) -> None:
    """Even a training that destroys everything is undone."""
    wrecked = unfitted(loss=loss, learning_rate=0.3, averaging=0.0, steps=20)
    report = wrecked.fit_inputs(layer_fakes.inputs())
    val = list(layer_fakes.inputs().batches("val"))
    base = evaluate_layer_recall(reuse(), val)["by_layer"]
    mine = evaluate_layer_recall(wrecked, val)["by_layer"]
    for h, of_layer in base.items():
        for one, other in zip(mine[h], of_layer, strict=True):
            assert one == other is None or one >= other - 1e-9
    assert report.details["val_recall"] >= report.details["val_recall_base"]


def test_disk_and_model_train_alike(tmp_path: Path) -> None:
    store = write_features(layer_fakes.inputs(), tmp_path, parents={}, max_bytes=1 << 30)
    live, stored = unfitted(steps=20), unfitted(steps=20)
    live.fit_inputs(layer_fakes.inputs())
    stored.fit_inputs(store)
    test = list(layer_fakes.inputs().batches("test"))
    one, other = (evaluate_layer_recall(p, test)["by_lookahead"]["1"] for p in (live, stored))
    assert abs(one - other) < 0.03


def test_one_seed_gives_one_result() -> None:
    results = [unfitted(steps=5) for _ in range(2)]
    for predictor in results:
        predictor.fit_inputs(layer_fakes.inputs())
    one, other = (predictor.tensors() for predictor in results)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_test_requests_change_nothing() -> None:
    inputs = layer_fakes.inputs()
    batches: Any = {split: list(inputs.batches(split)) for split in ("fit", "val")}
    tensors = []
    for test in ([], [layer_fakes.tokens()] * 3):
        predictor = unfitted(steps=5)
        predictor.fit_inputs(Planted(**batches, test=test))
        tensors.append(predictor.tensors())
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("variant", ["residual", "independent"])
def test_it_comes_back_from_disk(variant: str, tmp_path: Path) -> None:
    predictor = fitted(variant=variant)
    save_artifact(predictor, tmp_path / "a", spec=predictor.fitted_spec(), parents={})
    loaded = load_artifact(tmp_path / "a")
    with pytest.raises(ValueError, match=r"bind\(model\) comes first"):
        loaded.on_request(loaded.new_state(), Request(token_ids_P=np.array([1], np.int32)))
    with pytest.raises(SpecMismatchError, match="another checkpoint"):
        loaded.bind(tiny_model(layer_fakes.FAMILY, seed=1))
    loaded.bind(layer_fakes.model())
    one, other = (p.walk_layers(layer_fakes.tokens()) for p in (predictor, loaded))
    assert torch.equal(one.before_NLE, other.before_NLE)
    assert torch.equal(one.ahead_LNHE.nan_to_num(), other.ahead_LNHE.nan_to_num())


def test_inputs_can_be_left_out() -> None:
    predictor = fitted(inputs=("source",), steps=20)
    assert set(predictor._network().read) == {"context", "source"}
    fast = predictor.walk_layers(layer_fakes.tokens())
    slow = Predictor.walk_layers(predictor, layer_fakes.tokens())
    torch.testing.assert_close(fast.ahead_LNHE, slow.ahead_LNHE, equal_nan=True)


def test_nan_in_features_is_named_with_its_layer() -> None:
    tokens = layer_fakes.tokens()
    assert tokens.router_input_LND is not None
    bad_LND = tokens.router_input_LND.clone()
    bad_LND[1, 3, 4] = torch.nan
    planted = Planted(fit=[replace(tokens, router_input_LND=bad_LND)], val=[tokens])
    with pytest.raises(ValueError, match=r"router_input_LND holds NaN .* layers \[1\]"):
        unfitted().fit_inputs(planted)


def test_a_constant_target_is_an_error() -> None:
    tokens = layer_fakes.tokens()
    ids_LNK = torch.arange(4).expand_as(tokens.topk_expert_ids_LNK).clone()
    constant = replace(tokens, topk_expert_ids_LNK=ids_LNK)
    with pytest.raises(ValueError, match="the target is constant"):
        unfitted().fit_inputs(Planted(fit=[constant], val=[tokens]))


def test_one_request_only_says_what_is_missing() -> None:
    one: Any = {"fit": [np.arange(9)]}
    with pytest.raises(ValueError, match="no request has split 'val'"):
        unfitted().fit_inputs(LiveInputs(layer_fakes.model(), one))
    with pytest.raises(ValueError, match="no request has split 'fit'"):
        unfitted().fit_inputs(Planted(val=[layer_fakes.tokens()]))


def test_traces_of_another_model_say_what_is_needed() -> None:
    with pytest.raises(SpecMismatchError, match=r"the traces' own model.*model="):
        unfitted().fit(random_traces())
    with pytest.raises(ValueError, match=r"'gate_mlp' .* bind\(model\) comes first"):
        GateMLP().fit(random_traces())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variant": "both"}, "variant='both': must be"),
        ({"lookahead": 0}, "lookahead=0"),
        ({"width": 0}, "width=0"),
        ({"inputs": ["future"]}, r"unknown \['future'\]; there are"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"averaging": 1.0}, "averaging=1.0"),
        ({"max_seconds": 0.0}, "max_seconds=0.0"),
        ({"loss": "mse"}, "loss='mse': must be one of bce"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateMLP(**changed)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k=5: must be in 1\.\.num_experts=4"):
        replace(layer_fakes.inputs().spec, num_experts=4, top_k=5)
