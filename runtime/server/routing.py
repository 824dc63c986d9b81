"""Which experts the tokens of a request were routed to, as vLLM's arrays.

The routers are read by hooks (`data.observe.RouterRecorder`), while sequences run that ask. A
captured decode graph runs no hooks, hence the CPU only (`can_tell_routing`).

Shape letters: T tokens · L decoder layers · K experts per token.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from data.adapters import moe_layers
from data.errors import NotAMoEError


def can_tell_routing(model: Any) -> bool:
    """Whether hooks see the routers of ``model`` in every pass."""
    try:
        return model.device.type == "cpu" and bool(moe_layers(model))
    except (NotAMoEError, AttributeError):
        return False


class VllmLayout:
    """Turns ids of MoE layers into vLLM's, whose layer axis counts decoder layers.

    Args:
        model: Whose routers are read.
    """

    def __init__(self, model: Any) -> None:
        self._decoder_layers = [moe.decoder_layer for moe in moe_layers(model)]
        self._num_layers = model.config.get_text_config(decoder=True).num_hidden_layers

    def __call__(self, topk_expert_ids_TLK: Tensor) -> npt.NDArray[np.int16]:
        """The experts of each token, int16 [T, L, K] with zeros in dense layers."""
        num_tokens, _, top_k = topk_expert_ids_TLK.shape
        ids_TLK = np.zeros((num_tokens, self._num_layers, top_k), np.int16)
        ids_TLK[:, self._decoder_layers] = topk_expert_ids_TLK.numpy()
        return ids_TLK
