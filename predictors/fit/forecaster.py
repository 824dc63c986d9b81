"""Trains the forecaster's network on recorded routing.

What it learns: for every (token, layer, expert), how many tokens later the expert is used again.
The requests of the split "fit" are laid end to end, as a cache sees them, so that an expert's next
use may be in the next request. A request's own past, which is what the net reads, starts anew.

Shape letters: N rows of all requests, each request's T tokens and one more · B rows of a batch ·
T tokens · L MoE layers · E experts per layer · R rows of a history · G discounts.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.schema import Trace
from predictors.fit.training import TrainerSettings, known_warnings_ignored, make_trainer
from predictors.forecaster_net import ForecasterNet
from predictors.routing import expert_use_TLE
from predictors.token_history import (
    NUM_PAST,
    NUM_ROWS,
    NUM_TOKENS_READ,
    histories_of,
    tokens_read_N3,
)

logger = logging.getLogger(__name__)

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # Lightning's names
_NEVER = 30_000  # tokens until a use that does not come; every discount makes it 0


class Examples(NamedTuple):
    """All that is trained on. Row n is what is known before a token; row n + 1 what is after it.

    Attributes:
        past_NRLE: float16.
        copies_NRLE: float16; zero in the row after a request's last token.
        distance_NLE: int16, tokens until the next use, 1 for the token of this very row.
        tokens_N3: int32, embedding rows.
        examples_M: int64, the rows that belong to a token.
    """

    past_NRLE: Tensor
    copies_NRLE: Tensor
    distance_NLE: Tensor
    tokens_N3: Tensor
    examples_M: Tensor


def examples_of(
    traces: Sequence[Trace], popularity_LE: Tensor, top_k: int, token_rows: dict[int, int]
) -> Examples:
    """Examples from requests laid end to end.

    Every request is computed at once, straight into its place: besides the result, memory is needed
    for one request only.

    Args:
        traces: In the order in which a cache would see them.
        popularity_LE: float32, on the device where the examples are to lie.
        top_k: K.
        token_rows: The embedding row of each known token id; all others share row ``len``.
    """
    device, (L, E) = popularity_LE.device, popularity_LE.shape
    num_tokens = sum(trace.num_tokens for trace in traces)
    num_rows = num_tokens + len(traces)
    past_NRLE = torch.zeros(num_rows, NUM_PAST, L, E, dtype=torch.float16, device=device)
    copies_NRLE = past_NRLE.new_zeros(num_rows, NUM_ROWS - NUM_PAST, L, E)
    tokens_N3 = torch.zeros(num_rows, NUM_TOKENS_READ, dtype=torch.int32)
    uses_TLE = torch.zeros(num_tokens, L, E, dtype=torch.bool, device=device)
    num_before_N = torch.zeros(num_rows, dtype=torch.int64)  # tokens before the row
    is_example_N = torch.zeros(num_rows, dtype=torch.bool)
    row = token = 0
    for trace in traces:
        T = trace.num_tokens
        past_RLE, copies_RLE = histories_of(trace, popularity_LE, top_k)
        past_NRLE[row : row + T + 1] = past_RLE
        copies_NRLE[row : row + T] = copies_RLE
        tokens_N3[row : row + T + 1] = tokens_read_N3(trace, token_rows)
        uses_TLE[token : token + T] = torch.from_numpy(expert_use_TLE(trace, E)).to(device)
        num_before_N[row : row + T + 1] = torch.arange(token, token + T + 1)
        is_example_N[row : row + T] = True
        row, token = row + T + 1, token + T
    return Examples(
        past_NRLE,
        copies_NRLE,
        _distances(uses_TLE)[num_before_N.to(device)],
        tokens_N3.to(device),
        is_example_N.nonzero().flatten(),
    )


def _distances(uses_TLE: Tensor) -> Tensor:
    """Tokens until the next use, before each token and after the last: int16 [T + 1, L, E]."""
    num_tokens, num_layers, _ = uses_TLE.shape
    distance_TLE = uses_TLE.new_full(
        (num_tokens + 1, *uses_TLE.shape[1:]), _NEVER, dtype=torch.int16
    )
    place_T1 = torch.arange(num_tokens, dtype=torch.int32, device=uses_TLE.device)[:, None]
    for layer in range(num_layers):  # one at a time: the search for the next use takes int64
        used_TE = torch.where(uses_TLE[:, layer], place_T1, place_T1 + _NEVER)
        next_TE = used_TE.flip(0).cummin(0).values.flip(0)
        distance_TLE[:-1, layer] = (next_TE - place_T1 + 1).clamp(max=_NEVER)
    return distance_TLE


class Loss(nn.Module):
    """Cross-entropy of all three outputs, for rows of the examples.

    Args:
        net: What says them.
        examples: On the net's device.
        discounts: G of them.
    """

    def __init__(self, net: ForecasterNet, examples: Examples, discounts: Sequence[float]) -> None:
        super().__init__()
        self.net, self.examples = net, examples
        device = examples.distance_NLE.device
        self.discounts_G1 = torch.tensor(discounts, device=device)[:, None]

    def forward(self, rows_B: Tensor) -> Tensor:
        """One number, in nats; ``rows_B`` are int64 rows that belong to a token."""
        past_NRLE, copies_NRLE = self.examples.past_NRLE, self.examples.copies_NRLE
        copies_BRLE = copies_NRLE[rows_B].float()
        before_BRLE, after_BRLE = (
            torch.cat([past_NRLE[rows].float(), copies_BRLE], dim=1)
            for rows in (rows_B, rows_B + 1)
        )
        said = self.net.before(before_BRLE, self.examples.tokens_N3[rows_B].long())
        outputs = (said.next_BLE, said.ahead_BLE, self.net.after(said, after_BRLE))
        losses = [
            F.binary_cross_entropy_with_logits(output.float(), target)
            for output, target in zip(outputs, self.targets(rows_B), strict=True)
        ]
        return torch.stack(losses).sum()

    def targets(self, rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What next, ahead and later should have said, as probabilities."""
        distance_NLE = self.examples.distance_NLE
        before_BLE, after_BLE = distance_NLE[rows_B].float(), distance_NLE[rows_B + 1].float()
        return (
            (before_BLE == 1).float(),
            (self.discounts_G1 ** (before_BLE[:, :, None] - 1)).mean(2),
            self.discounts_G1 ** (after_BLE[:, :, None] - 1),
        )


class ForecasterModule(lightning.LightningModule):  # type: ignore[misc,unused-ignore]
    """A network in training.

    On one GPU, the loss and its gradients are captured in CUDA graphs: hundreds of kernels so small
    that launching them takes longer than they run.

    Args:
        examples: What it is trained on; it moves to the trainer's device as a whole.
        net: The sizes that `ForecasterNet` takes.
        discounts: G of them.
        batch_size: Rows of every step.
        learning_rate: The highest; it warms up over a tenth of the steps and falls as a cosine.
        weight_decay: On matrices, but not on embeddings and on an expert's own terms.
    """

    def __init__(
        self,
        *,
        examples: Examples,
        net: dict[str, Any],
        discounts: Sequence[float],
        batch_size: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.examples = examples
        self.net = ForecasterNet(**net)
        self.discounts = tuple(discounts)
        self.batch_size = batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        sample = examples.examples_M[:: max(1, len(examples.examples_M) // 4096)]
        next_BLE, ahead_BLE, later_BLGE = Loss(self.net, examples, self.discounts).targets(sample)
        self.net.start_at(next_BLE.mean(0), ahead_BLE.mean(0), later_BLGE.mean(0))

    def on_fit_start(self) -> None:
        """Bring the examples to the device."""
        self.examples = Examples(*(tensor.to(self.device) for tensor in self.examples))
        loss: Any = Loss(self.net, self.examples, self.discounts)
        if self.device.type == "cuda" and self.trainer.world_size == 1:
            dtype = _MIXED.get(self.trainer.precision)
            # Casts that autocast remembers would belong to the warm-up, not to the graph.
            with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
                rows_B = self.examples.examples_M[: self.batch_size].clone()  # is written to
                loss = torch.cuda.make_graphed_callables(loss, (rows_B,))
        self._loss = [loss]  # in a list: its parameters are the network's, registered once

    def training_step(self, rows_B: Tensor) -> Tensor:
        """The loss of one batch."""
        loss: Tensor = self._loss[0](rows_B)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with one cycle of the learning rate."""
        plain = {"embedding.weight", "own_next_RLE", "own_ahead_RLE", "own_later_RLGE"}
        decayed: list[Tensor] = []
        free: list[Tensor] = []
        for name, parameter in self.net.named_parameters():
            (free if parameter.ndim < 2 or name in plain else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches) + 1,
            pct_start=0.1,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def fit_net(
    examples: Examples,
    *,
    net: dict[str, Any],
    discounts: Sequence[float],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    trainer: TrainerSettings | None,
) -> ForecasterNet:
    """Train one network; returns it on the CPU, in eval mode.

    On several devices each of them takes ``batch_size`` rows a step.

    Raises:
        ValueError: The loss is not finite: the examples or the learning rate are at fault.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        runner = make_trainer(trainer, max_epochs=epochs, prefer_bf16=True)
        rows: Any = examples.examples_M.tolist()
        batch_size = min(batch_size, max(1, len(rows) // runner.world_size))
        module = ForecasterModule(
            examples=examples,
            net=net,
            discounts=discounts,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )
        loader: DataLoader[int] = DataLoader(
            rows,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=torch.tensor,
        )
        with known_warnings_ignored():
            runner.fit(module, loader)
    loss = float(runner.callback_metrics["loss"])
    if not np.isfinite(loss):
        raise ValueError(f"training ended with loss {loss}: lower learning_rate={learning_rate}")
    logger.info("trained for %d steps, loss %.4f", runner.global_step, loss)
    return module.net.cpu().eval()
