"""Training of `predictors.sequence_net` with Lightning.

Knows use per request, in order of arrival; nothing of traces or forecasts.

Shape letters: B windows · M requests in a window, oldest first · L MoE layers · E experts per layer
· N requests.
"""

import copy
import warnings
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from predictors.fit.training import TrainerSettings, known_warnings_ignored, make_trainer
from predictors.request_history import last_call
from predictors.sequence_net import SequenceNet

_WINDOWS_PER_EPOCH = 1024  # drawn with replacement: a fit costs the same on any number of requests

Example = tuple[Tensor, Tensor]
"""A window float32 [M, L, E], and the use [L, E] of a request after it."""


class Windows(Dataset[Example]):
    """Each request of a stream, with the window that a forecast for it is made from.

    Args:
        use_NLE: float32, the stream in order of arrival.
        popularity_LE: float32, stands in for requests before the first.
        window: M.
        period: Forecasts are that many requests apart. While training, the age of the forecast is
            drawn anew each time, so that what is learned is best for the whole period.
        random_age: Draw; else every age is what `last_call` makes it.
    """

    def __init__(
        self,
        use_NLE: Tensor,
        popularity_LE: Tensor,
        *,
        window: int,
        period: int,
        random_age: bool = False,
    ) -> None:
        # Request n lies at row n + window, so rows n..n+window-1 are the requests before it.
        self._padded_NLE = torch.cat([popularity_LE.expand(window, -1, -1), use_NLE])
        self._window, self._period, self._random_age = window, period, random_age

    def __len__(self) -> int:
        """N."""
        return len(self._padded_NLE) - self._window

    def __getitem__(self, request: int) -> Example:
        """Window and target of the ``request``-th request."""
        if self._random_age:
            oldest = min(self._period - 1, request)
            made_at = request - int(torch.randint(oldest + 1, ()))
        else:
            made_at = last_call(request, self._period)
        window_MLE = self._padded_NLE[made_at : made_at + self._window]
        return window_MLE, self._padded_NLE[request + self._window]


class SequenceModule(lightning.LightningModule):  # type: ignore[misc]
    """Binary cross entropy between forecast and the request's shares of use.

    Args:
        net: What is trained; left out of the hyper-parameters, which are plain values.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: AdamW's.
    """

    def __init__(self, net: SequenceNet, *, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net

    def loss(self, batch: Example, *, teach: bool) -> Tensor:
        """Mean over requests, layers and experts."""
        window_BMLE, next_BLE = batch
        logits_BLE = self.net(window_BMLE, next_BLE if teach else None)
        return nn.functional.binary_cross_entropy_with_logits(logits_BLE, next_BLE)

    def training_step(self, batch: Example, batch_index: int) -> Tensor:
        """Form L is shown the request's own earlier layers here, and here alone."""
        return self.loss(batch, teach=True)

    def validation_step(self, batch: Example, batch_index: int) -> None:
        """What a forecast costs that is made as it would be when serving."""
        loss = self.loss(batch, teach=False)
        self.log("val/loss", loss, batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW, one cycle; the mixture of counts is few numbers that must move far."""
        hyper = self.hparams
        trained = [(n, p) for n, p in self.net.named_parameters() if p.requires_grad]
        mixture = [p for n, p in trained if n == "mixture_M1"]
        groups = [{"params": [p for n, p in trained if n != "mixture_M1"]}]
        rates = [hyper["learning_rate"]]
        if mixture:
            groups.append({"params": mixture, "weight_decay": 0.0})  # type: ignore[dict-item]
            rates.append(25 * hyper["learning_rate"])
        optimizer = torch.optim.AdamW(groups, weight_decay=hyper["weight_decay"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            rates,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.1,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class KeepBest(lightning.Callback):  # type: ignore[misc]
    """Leaves a module with the weights of the epoch that had the least validation loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.best: dict[str, Tensor] | None = None

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        """Remember the weights if no epoch so far was better."""
        if trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics["val/loss"])
        if not self.losses or loss < min(self.losses):
            self.best = copy.deepcopy(module.state_dict())
        self.losses.append(loss)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Here and not after `fit`: a spawned process hands back its module, not its callbacks."""
        if self.best is not None:
            module.load_state_dict(self.best)


class Trained(NamedTuple):
    """How training went.

    Attributes:
        val_losses: After each epoch; empty without validation, or where other processes trained.
        num_steps: Of the optimizer.
    """

    val_losses: list[float]
    num_steps: int


def train(
    net: SequenceNet,
    fit_NLE: Tensor,
    val_NLE: Tensor,
    *,
    window: int,
    period: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    settings: TrainerSettings | None,
) -> Trained:
    """Train ``net`` in place; leaves it on the CPU, in evaluation mode.

    Args:
        net: Of either form.
        fit_NLE: float32 use of the fitted requests, in order of arrival.
        val_NLE: The same of those that choose the epoch; none: the last epoch is taken.
        window: M.
        period: Requests between forecasts.
        epochs: Of 1024 windows each.
        batch_size: Windows.
        learning_rate: Peak.
        weight_decay: AdamW's.
        settings: `make_trainer` has them.
    """
    fitted = Windows(fit_NLE, net.popularity_LE, window=window, period=period, random_age=True)
    chosen_by = Windows(val_NLE, net.popularity_LE, window=window, period=period)
    loader: DataLoader[Any] = DataLoader(
        fitted,
        batch_size=batch_size,
        sampler=RandomSampler(fitted, replacement=True, num_samples=_WINDOWS_PER_EPOCH),
    )
    validation: DataLoader[Any] = DataLoader(chosen_by, batch_size=256)
    module = SequenceModule(net, learning_rate=learning_rate, weight_decay=weight_decay)
    keep_best = KeepBest()
    trainer = make_trainer(settings, max_epochs=epochs, callbacks=[keep_best])
    with known_warnings_ignored():
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")
        trainer.fit(module, loader, validation if len(val_NLE) else None)
    net.cpu().eval()
    return Trained(keep_best.losses, trainer.global_step)
