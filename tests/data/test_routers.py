"""A model's own routers, asked about inputs of one's own."""

import pytest
import torch
from torch import nn

from data.adapters import moe_layers
from data.router_inputs import LiveInputs
from data.routers import Routers, raised_TE
from tests.families import FAMILIES, tiny_model

PROMPTS = [torch.arange(5, 29).numpy(), torch.arange(90, 101).numpy()]


def sets(ids_TK: torch.Tensor) -> list[list[int]]:
    return [sorted(row) for row in ids_TK.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_staleness_every_slot_is_recalled(family: str, dtype: torch.dtype) -> None:
    """Layer l's router on layer l's own input must choose exactly what ran, whatever its rule."""
    model = tiny_model(family, dtype=dtype)
    routers = Routers(model)
    (tokens,) = LiveInputs(model, {"test": PROMPTS}).batches("test")
    assert tokens.router_input_LND is not None
    top_k = tokens.topk_expert_ids_LNK.shape[-1]
    for layer, used_NK in enumerate(tokens.topk_expert_ids_LNK):
        scores_NE = routers.scores_TE(layer, tokens.router_input_LND[layer])
        assert sets(scores_NE.topk(top_k).indices) == sets(used_NK)


def test_a_rule_that_overrules_the_scores_is_followed() -> None:
    """The control of the test above: plain scores would miss what a bias and groups choose."""
    model = tiny_model("deepseek_v3")
    (tokens,) = LiveInputs(model, {"test": PROMPTS}).batches("test")
    top_k = tokens.topk_expert_ids_LNK.shape[-1]
    plain = tokens.router_probs_LNE.topk(top_k).indices
    assert sets(plain.flatten(0, 1)) != sets(tokens.topk_expert_ids_LNK.flatten(0, 1))


def test_raising_changes_nothing_where_the_choice_is_on_top() -> None:
    scores_TE = torch.randn(20, 8)
    chosen_TK = scores_TE.topk(3).indices
    assert torch.equal(raised_TE(scores_TE, chosen_TK), scores_TE)


def test_asking_fires_no_hook() -> None:
    """Or whoever records the model would take a question for a token."""
    model = tiny_model("olmoe")
    seen: list[int] = []
    handle = moe_layers(model)[0].router.register_forward_hook(lambda *_: seen.append(1))
    Routers(model).scores_TE(0, torch.randn(3, 32))
    handle.remove()
    assert not seen


def test_a_router_that_reads_more_than_hidden_states_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("olmoe")

    def forward(self: nn.Module, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(moe_layers(model)[0].router), "forward", forward)
    with pytest.raises(ValueError, match=r"OlmoeTopKRouter takes hidden_states, input_ids"):
        Routers(model)
