"""Asking a model's own routers what they would choose for any input.

Whatever a family's routing rule is (softmax, sigmoid with a bias, limited to groups of experts),
its router module is what decides, so that module is run; no rule is written a second time here.
Knows nothing of forecasts.

Shape letters: T tokens · L MoE layers · E experts per layer · D hidden.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from data.adapters import moe_layers, router_probs_TE

_ABOVE = 1e-3  # how far, in logits, the chosen experts are raised above the best of the others
_LEAST = 1e-30  # of a probability, before its logarithm


class Routers:
    """The routers of a loaded model, to be run on inputs of one's own.

    Running one fires none of its hooks and changes nothing in the model.

    Args:
        model: A transformers model that routes through ``ExpertsInterface``.

    Raises:
        NotAMoEError: The model has no routers.
        ValueError: A router reads more than hidden states (such as token ids).
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = moe_layers(model)
        router = self._layers[0].router
        required = [
            name
            for name, parameter in inspect.signature(router.forward).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(required) != 1:
            raise ValueError(
                f"{type(router).__name__} takes {', '.join(required)}: only routers that take "
                "hidden states alone can be asked about other inputs"
            )
        self._dtype = next(router.parameters()).dtype

    def __len__(self) -> int:
        """L."""
        return len(self._layers)

    @torch.no_grad()
    def scores_TE(self, layer: int, router_input_TD: Tensor) -> Tensor:
        """Rank layer ``layer``'s experts for some router inputs as its router would.

        The logarithms of its probabilities; where its rule chose experts that do not have the
        highest ones (because of a bias, or of groups), all that it chose are raised by one amount,
        so that the lowest of them stands just above the best of the others.

        Args:
            layer: Whose router to ask.
            router_input_TD: Inputs, of this layer or of another, any float dtype.

        Returns:
            float32 [T, E]; the router's choice is exactly the K highest.
        """
        moe = self._layers[layer]
        # Not router(...): the hooks of whoever observes the model must not see this.
        output = moe.router.forward(router_input_TD.to(self._dtype))
        probs_TE = router_probs_TE(moe, output[0].reshape(len(router_input_TD), -1))
        return raised_TE(
            probs_TE.clamp_min(_LEAST).log(), output[2].reshape(len(router_input_TD), -1)
        )


def raised_TE(scores_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    """Change ``scores_TE`` as little as makes ``chosen_TK`` the K highest (`Routers.scores_TE`)."""
    is_chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK.long(), True)
    lowest_T1 = scores_TE.masked_fill(~is_chosen_TE, torch.inf).amin(1, keepdim=True)
    others_T1 = scores_TE.masked_fill(is_chosen_TE, -torch.inf).amax(1, keepdim=True)
    raise_T1 = torch.where(
        lowest_T1 <= others_T1, others_T1 - lowest_T1 + _ABOVE * (1 + others_T1.abs()), 0.0
    )
    return scores_TE + raise_T1 * is_chosen_TE


def input_embedding(model: Any) -> nn.Embedding:
    """The model's input embedding: what is known of a token before layer 0.

    Raises:
        ValueError: The model has none that is a plain table.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} embeds tokens by {type(embedding).__name__}: "
            "only a plain nn.Embedding can be read"
        )
    return embedding
