"""What a predictor must be to run inside a captured CUDA graph: a fixed-shape tensor program.

`Predictor.graph_module` gives one, where the predictor has it; the others run on the host, beside
the graph, and write their forecasts into a tensor that it reads.

A graph replays addresses, so whatever a module keeps between calls is a buffer that it updates in
place; for the rest, the rules of `runtime.policies.base` hold. One module serves the B rows of one
batch. What is kept and what is evicted is decided for the batch, so outputs are means over rows.

Shape letters: B rows of a batch · T tokens of a prompt · L MoE layers · E experts per layer ·
K experts per token.
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor, nn


class GraphPredictor(nn.Module, ABC):
    """A fitted predictor for B rows; the calls are `predictors.base.Predictor`'s, in that order.

    Buffers are named by their shapes, as everything is here: what has a B among the letters behind
    the last underscore holds something of each row (`of_row`). The others may be held once for
    modules of several batch sizes, of which one is at work: `begin` writes anew what changes.

    Attributes:
        prompt_tokens: How many of a prompt's last tokens tell it all that it can use.
        next_LE: float32 buffer: use by the next token, calibrated.
        forecast_LE: float32 buffer: the whole forecast (`predictors.base.Forecast`).
    """

    prompt_tokens: ClassVar[int] = 1024
    next_LE: Tensor
    forecast_LE: Tensor

    @abstractmethod
    def begin(self) -> None:
        """New requests in all rows: forget the past and say what is expected of a first token."""

    @abstractmethod
    def on_token(
        self, expert_map_BLE: Tensor | None, token_ids_B: Tensor, next_token_ids_B: Tensor
    ) -> None:
        """All rows' tokens have passed all layers: look ahead again.

        Args:
            expert_map_BLE: float32, their router probabilities; None where `on_routed` has been
                shown all layers, which then is what counts and spares sorting the maps.
            token_ids_B: int64, the finished tokens' ids, -1 = not known.
            next_token_ids_B: int64, the ids that are fed next, likewise.
        """

    @abstractmethod
    def on_routed(
        self,
        layer: int,
        topk_expert_ids_BK: Tensor,
        topk_probs_BK: Tensor,
        out_E: Tensor | None = None,
    ) -> Tensor:
        """Use of one layer's experts after the tokens that it has just routed, float32 [E].

        Called for layers 0, 1, ... in turn, in the unit of ``forecast_LE - next_LE``. It stands
        between a router and its experts, so every launch counts: what a router gives is taken as it
        is, and what does not depend on it is computed before.

        Args:
            layer: The layer.
            topk_expert_ids_BK: int64, the experts that run.
            topk_probs_BK: Their probabilities, or weights in proportion to them.
            out_E: float32, where to put the answer (it is returned); None for a new tensor.
        """

    def on_prompt(
        self, expert_map_BTLE: Tensor, token_ids_BT: Tensor, next_token_ids_B: Tensor
    ) -> None:
        """As `on_token` for each token of a prompt of at least one, right after `begin`.

        Override it only to say the same faster: a test compares.

        Args:
            expert_map_BTLE: float32, the last `prompt_tokens` of them or fewer.
            token_ids_BT: int64, -1 = not known.
            next_token_ids_B: int64, the ids that are fed after the prompt.
        """
        num_tokens = token_ids_BT.shape[1]
        for t in range(num_tokens):
            following_B = next_token_ids_B if t + 1 == num_tokens else token_ids_BT[:, t + 1]
            self.on_token(expert_map_BTLE[:, t], token_ids_BT[:, t], following_B)

    def of_row(self, row: int) -> Self:
        """A module of one row that keeps its past in this module's memory, for that row's prompt.

        Its forecasts are its own: the batch's stand where they are until the next `on_token`.
        """
        view = copy.copy(self)
        view._buffers = {}
        for name, buffer in self._buffers.items():
            assert buffer is not None
            letters = name.rpartition("_")[2]
            if "B" in letters:
                buffer = buffer.narrow(letters.index("B"), row, 1)
            elif name in ("next_LE", "forecast_LE"):
                buffer = buffer.clone()
            view._buffers[name] = buffer
        return view
