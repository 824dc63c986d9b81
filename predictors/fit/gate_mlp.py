"""Training the networks of `gate_mlp` on router inputs, from a running model or from disk.

Knows nothing of where router inputs come from, nor of what the network reads.

Shape letters: U units · N tokens · L MoE layers · E experts per layer · H targets of a unit.
"""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from data.router_inputs import RoutedTokens, RouterInputs
from predictors.fit.training import TrainerSettings, known_warnings_ignored, make_trainer
from predictors.gate_losses import LOSSES
from predictors.gate_net import EMBEDDING, GateNet, Units
from predictors.gate_reader import TokenRow

logger = logging.getLogger(__name__)

Read = Callable[[RoutedTokens, Tensor | None], tuple[TokenRow, dict[str, Tensor], Tensor]]

_CHECKS = 10  # looks at the validation requests
_WARM_UP = 0.03  # share of the training
_MAX_VAL_TOKENS = 8192  # judged ten times, and held in memory with all that is read of them
_FORGETS = 0.05  # share of tokens whose past is hidden, as a prompt's is (`GateReader.read`)


class GateBatch(NamedTuple):
    """What one step needs.

    Attributes:
        row: The tokens' embeddings.
        inputs: What else the network reads.
        base_UNHE: What it corrects.
        used_UNHE: bool, what was used.
        shares_UNHE: The router's probabilities.
        progress: Of the training, in [0, 1).
    """

    row: TokenRow
    inputs: dict[str, Tensor]
    base_UNHE: Tensor
    used_UNHE: Tensor
    shares_UNHE: Tensor
    progress: float


class FittedGate(NamedTuple):
    """What training found.

    Attributes:
        use_LE: float32, mean use of each expert by the tokens that were trained on.
        num_requests: Requests trained on, each as often as it was seen.
        num_tokens: Tokens, likewise.
        details: Plain values for a `FitReport`.
    """

    use_LE: Tensor
    num_requests: int
    num_tokens: int
    details: dict[str, Any]


class GateModule(lightning.LightningModule):  # type: ignore[misc,unused-ignore]
    """The training of one network; constructor arguments are plain values.

    Args:
        loss: A name of `predictors.gate_losses.LOSSES`.
        learning_rate: At its highest.
        averaging: Time constant of the weights' moving average, as a share of the training.
        targets: Of each unit, how many targets it has.
    """

    def __init__(
        self, *, loss: str, learning_rate: float, averaging: float, targets: list[int]
    ) -> None:
        super().__init__()
        self.loss, self.learning_rate, self.averaging = LOSSES[loss], learning_rate, averaging
        valid = [[h < count for h in range(max(targets))] for count in targets]
        self.register_buffer("valid_UH", torch.tensor(valid), persistent=False)
        self.valid_UH: Tensor
        self.best: dict[str, Tensor] = {}
        self.best_UH = torch.full(self.valid_UH.shape, -1.0)
        self.history: list[float] = []
        self._hits: list[tuple[Tensor, int]] = []
        self._progress = self._keep = 0.0

    def train_net(self, net: GateNet) -> None:
        """Say which network; called once."""
        self.net = net
        self.averaged = AveragedModel(net, avg_fn=self._average)

    def training_step(self, batch: GateBatch, index: int) -> Tensor:
        """The mean loss over tokens and targets."""
        warm = min(1.0, (batch.progress + 1e-3) / _WARM_UP)
        rate = self.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * batch.progress))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        scores_UNHE = scores_of(self.net, batch)
        loss_UNH = self.loss(scores_UNHE, batch.used_UNHE, batch.shares_UNHE)
        return (loss_UNH.mean(1) * self.valid_UH).sum() / self.valid_UH.sum()

    def on_train_batch_end(self, outputs: Any, batch: GateBatch, index: int) -> None:
        """Average the weights, over a share of the training whatever its length."""
        passed = batch.progress - self._progress
        self._progress = batch.progress
        self._keep = math.exp(-passed / self.averaging) if self.averaging else 0.0
        self.averaged.update_parameters(self.net)

    def _average(self, averaged: Tensor, weight: Tensor, num_averaged: Any) -> Tensor:
        return averaged.lerp(weight, 1.0 - self._keep)

    def validation_step(self, batch: GateBatch, index: int) -> None:
        """Count the hits of the averaged weights."""
        averaged: Any = self.averaged.module  # a copy of the network
        scores_UNHE = scores_of(averaged, batch)
        self._hits.append((hits_UH(scores_UNHE, batch.used_UNHE), len(batch.used_UNHE[0])))

    def on_validation_epoch_end(self) -> None:
        """Keep the weights where they were best so far."""
        hits, counts = zip(*self._hits, strict=True)
        self._hits.clear()
        if self.trainer.sanity_checking:
            return
        self.keep((torch.stack(hits).sum(0) / sum(counts)).cpu(), self.averaged.module)

    def keep(self, recall_UH: Tensor, net: nn.Module) -> None:
        """Take over ``net`` if it is better than what is kept: its units share what they read."""
        valid_UH = self.valid_UH.cpu()
        now, best = (float(recall[valid_UH].mean()) for recall in (recall_UH, self.best_UH))
        if now > best:
            self.best_UH = recall_UH
            self.best = {name: weight.clone() for name, weight in net.state_dict().items()}
        self.history.append(now)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the schedule is `training_step`'s, which knows the clock."""
        return torch.optim.AdamW(self.net.parameters(), lr=self.learning_rate, weight_decay=0.01)


def scores_of(net: GateNet, batch: GateBatch) -> Tensor:
    """What a network says of a batch, float32 [U, N, H, E]."""
    scores_UNHE: Tensor = net(net.context(*batch.row), batch.inputs, batch.base_UNHE)
    return scores_UNHE


def hits_UH(scores_UNHE: Tensor, used_UNHE: Tensor) -> Tensor:
    """Slot recall at K summed over tokens: float32 [U, H]."""
    top_k = int(used_UNHE[0, 0, 0].sum())
    found = used_UNHE.gather(-1, scores_UNHE.topk(top_k, dim=-1).indices)
    return found.float().mean(-1).sum(1)


class _Batches:
    """Training batches, as many a time as lie between two looks at the validation requests."""

    def __init__(
        self,
        prepare: Callable[[RoutedTokens, Tensor | None, float], GateBatch],
        inputs: RouterInputs,
        *,
        steps: int,
        max_seconds: float | None,
        seed: int,
    ) -> None:
        self._prepare = prepare
        self._steps, self._max_seconds = steps, max_seconds
        self._started_s = time.perf_counter()
        self._tokens = self._endless(inputs, seed)
        self._random = torch.Generator().manual_seed(seed)
        self._check_at = 0.0
        self.step = 0
        self.num_requests = self.num_tokens = 0
        self.use_LE: Tensor | None = None

    @property
    def progress(self) -> float:
        """Share of the steps, or of the seconds if those run out earlier."""
        elapsed_s = time.perf_counter() - self._started_s
        return max(self.step / self._steps, elapsed_s / (self._max_seconds or math.inf))

    def __iter__(self) -> Iterator[GateBatch]:
        """The batches up to the next look."""
        self._check_at += 1.0 / _CHECKS
        while (progress := self.progress) < min(self._check_at, 1.0):
            tokens = next(self._tokens)
            self._count(tokens)
            forgotten_N = torch.rand(len(tokens.starts_N), generator=self._random) < _FORGETS
            yield self._prepare(tokens, forgotten_N.to(tokens.starts_N.device), progress)
            self.step += 1

    def _count(self, tokens: RoutedTokens) -> None:
        self.num_requests += int(tokens.starts_N.sum())
        self.num_tokens += len(tokens.starts_N)
        probs_LNE = tokens.router_probs_LNE
        used_LE = torch.zeros_like(probs_LNE).scatter_(-1, tokens.topk_expert_ids_LNK, 1.0).sum(1)
        self.use_LE = used_LE if self.use_LE is None else self.use_LE + used_LE

    @staticmethod
    def _endless(inputs: RouterInputs, seed: int) -> Iterator[RoutedTokens]:
        for epoch in itertools.count():
            is_empty = True
            for tokens in inputs.batches("fit", seed=seed + 1000 * epoch):
                is_empty = False
                yield tokens
            if is_empty:
                raise ValueError("no request has split 'fit': nothing to learn from")


def fit_gate(
    net: GateNet,
    read: Read,
    units: Units,
    inputs: RouterInputs,
    *,
    loss: str,
    steps: int,
    max_seconds: float | None,
    learning_rate: float,
    averaging: float,
    has_base: bool,
    seed: int,
    trainer: TrainerSettings | None,
) -> FittedGate:
    """Train ``net`` in place; it ends nowhere below its base on the validation requests.

    The weights' moving average is looked at ten times, and the best is kept. A target that is then
    below its base gets it back: its head is set to zero.

    Args:
        net: Untrained.
        read: What the network reads of tokens, and the base.
        units: What it forecasts from where.
        inputs: The requests "fit" and "val".
        loss: A name of `predictors.gate_losses.LOSSES`.
        steps: Training steps.
        max_seconds: Ends training earlier, or None.
        learning_rate: At its highest.
        averaging: Time constant of the weights' moving average, as a share of the training.
        has_base: The base is a ranking (and not zeros), to fall back on.
        seed: Of the order of requests.
        trainer: Keyword arguments of `lightning.Trainer`.

    Raises:
        ValueError: A split is empty, an input is not finite, or every token uses the same experts.
    """
    module = GateModule(
        loss=loss,
        learning_rate=learning_rate,
        averaging=averaging,
        targets=[len(targets) for targets in units.targets],
    )
    module.train_net(net)
    target_UH = units.target_UH()
    used_by_router = [source != EMBEDDING for source in units.sources]

    def prepare(tokens: RoutedTokens, forgotten_N: Tensor | None, progress: float) -> GateBatch:
        _refuse_bad(tokens)
        row, values, base_UNHE = read(tokens, forgotten_N)
        targets = target_UH.to(base_UNHE.device)
        probs_LNE = tokens.router_probs_LNE.to(base_UNHE.device)
        used_LNE = torch.zeros_like(probs_LNE, dtype=torch.bool).scatter_(
            -1, tokens.topk_expert_ids_LNK.to(base_UNHE.device), True
        )
        return GateBatch(
            row,
            values,
            base_UNHE,
            used_LNE[targets].transpose(1, 2),
            probs_LNE[targets].transpose(1, 2),
            progress,
        )

    val = [prepare(tokens, None, 0.0) for tokens in _first_tokens(inputs)]
    batches = _Batches(prepare, inputs, steps=steps, max_seconds=max_seconds, seed=seed)
    base_UH = _recall_UH(net, val)
    module.keep(base_UH, net)
    lightning_trainer = make_trainer(trainer, max_epochs=_CHECKS)
    if lightning_trainer.world_size > 1:
        raise ValueError(
            f"trainer={dict(trainer or {})}: gate_mlp runs the model while it trains, and that is "
            "on one device; take trainer=auto"
        )
    with known_warnings_ignored():
        warnings.filterwarnings("ignore", message=".*Trying to infer the `batch_size`.*")
        lightning_trainer.fit(module, batches, DataLoader(val, batch_size=None, collate_fn=_as_is))  # type: ignore[arg-type]
    net.load_state_dict(module.best)
    val_UH, num_kept = module.best_UH, 0
    if has_base:
        num_kept = _fall_back(net, base_UH, val_UH, module.valid_UH.cpu())
        val_UH = val_UH.maximum(base_UH)
    assert batches.use_LE is not None
    from_router = torch.tensor(used_by_router)[:, None] & module.valid_UH.cpu()
    logger.info(
        "gate_mlp: recall on val %.3f -> %.3f in %d steps",
        float(base_UH[from_router].mean()),
        float(val_UH[from_router].mean()),
        batches.step,
    )
    return FittedGate(
        batches.use_LE / batches.num_tokens,
        batches.num_requests,
        batches.num_tokens,
        {
            "steps": batches.step,
            "val_recall_base": float(base_UH[from_router].mean()),
            "val_recall": float(val_UH[from_router].mean()),
            "val_recall_history": module.history,
            "targets_left_at_base": num_kept,
        },
    )


def _first_tokens(inputs: RouterInputs) -> Iterator[RoutedTokens]:
    """The validation requests, as many as fit in memory beside the training."""
    num_tokens = 0
    for tokens in inputs.batches("val", seed=0):
        yield tokens
        num_tokens += len(tokens.starts_N)
        if num_tokens >= _MAX_VAL_TOKENS:
            return
    if not num_tokens:
        raise ValueError(
            "no request has split 'val': gate_mlp needs some to fit on and others to stop by, so "
            "at least two requests of different topics"
        )


@torch.no_grad()
def _recall_UH(net: GateNet, batches: list[GateBatch]) -> Tensor:
    device = next(net.parameters()).device
    hits = [hits_UH(scores_of(net, b), b.used_UNHE).to(device) for b in batches]
    return (torch.stack(hits).sum(0) / sum(b.used_UNHE.shape[1] for b in batches)).cpu()


@torch.no_grad()
def _fall_back(net: GateNet, base_UH: Tensor, best_UH: Tensor, valid_UH: Tensor) -> int:
    """Zero the heads of the targets that were better off without."""
    worse_UH = (best_UH < base_UH) & valid_UH
    device = net.head.device
    worse_U1H1 = worse_UH.to(device)[:, None, :, None]
    for weight in (net.head, net.direct, net.head_bias):
        weight.view(*weight.shape[:2], net.num_targets, net.num_experts).masked_fill_(
            worse_U1H1, 0.0
        )
    net.base_scale.masked_fill_(worse_U1H1, 1.0)
    return int(worse_UH.sum())


def _as_is(batch: GateBatch) -> GateBatch:
    return batch


def _refuse_bad(tokens: RoutedTokens) -> None:
    """Name what cannot be learned from."""
    for name in ("router_input_LND", "router_probs_LNE"):
        values: Tensor | None = getattr(tokens, name)
        if values is not None and not bool(values.isfinite().all()):
            bad = (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(f"{name} holds NaN or infinite values in MoE layers {bad}")
    ids_LNK = tokens.topk_expert_ids_LNK.sort(-1).values
    if ids_LNK.shape[1] > 1 and bool((ids_LNK == ids_LNK[:, :1]).all()):
        raise ValueError(
            f"all {ids_LNK.shape[1]} tokens of a batch use the same experts in every layer: the "
            "target is constant, there is nothing to learn"
        )
