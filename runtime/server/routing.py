"""Which experts the tokens of a request were routed to, as vLLM's arrays.

Reads the routers by hooks while one sequence runs, so a request that does not ask costs nothing.
A captured decode graph runs no hooks, hence the CPU only (`can_tell_routing`).

Shape letters: T tokens · N routed rows · L decoder layers · K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from data.adapters import moe_layers
from data.errors import NotAMoEError
from data.observe import RouterRecorder

TakeRouting = Callable[[], npt.NDArray[np.int16] | None]


def can_tell_routing(model: Any) -> bool:
    """Whether `record_routing` works for ``model``: routers that hooks see in every pass."""
    try:
        return model.device.type == "cpu" and bool(moe_layers(model))
    except (NotAMoEError, AttributeError):
        return False


@contextmanager
def record_routing(model: Any, *, wanted: bool) -> Iterator[TakeRouting]:
    """Listen to the routers of ``model``, if ``wanted``.

    Yields:
        A function that gives the experts of all tokens since its last call, int16 [T, L, K] with
        zeros in dense layers (vLLM's layer axis counts decoder layers); None if not wanted.
    """
    if not wanted:
        yield lambda: None
        return
    decoder_layers = [moe.decoder_layer for moe in moe_layers(model)]
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers

    with RouterRecorder(model, keep_router_probs=False) as recorder:

        def take() -> npt.NDArray[np.int16]:
            ids_NLK = recorder.take().ids_NLK.numpy()
            ids_TLK = np.zeros((len(ids_NLK), num_layers, ids_NLK.shape[-1]), np.int16)
            ids_TLK[:, decoder_layers] = ids_NLK
            return ids_TLK

        yield take
