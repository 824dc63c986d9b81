"""Trainers as the settings ask for them, and processes that leave nothing running."""

from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from predictors.fit.training import SpawnedDDP, known_warnings_ignored, make_trainer


def thread_names() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


class Watched(SpawnedDDP):
    """Writes down which threads of a process group run around its end, for each process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def teardown(self) -> None:
        before = sum("gloo" in name for name in thread_names())
        super().teardown()
        after = sum("gloo" in name for name in thread_names())
        (self.folder / str(self.global_rank)).write_text(f"{before > 0} {after}")


class Line(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch_B1: torch.Tensor) -> torch.Tensor:
        return self.layer(batch_B1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_spawned_processes_stop_the_threads_of_their_process_group(tmp_path: Path) -> None:
    """With threads left over, a process aborted now and then, after the fit had finished."""
    settings = {"accelerator": "cpu", "devices": 2, "strategy": Watched(tmp_path)}
    trainer = make_trainer({**settings, "enable_progress_bar": False}, max_epochs=1)
    with known_warnings_ignored():
        trainer.fit(Line(), DataLoader(torch.ones(8, 1), batch_size=2))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "True 0",
        "1": "True 0",
    }


@pytest.mark.parametrize(("strategy", "kind"), [("ddp_spawn", SpawnedDDP), ("ddp", DDPStrategy)])
def test_the_strategy_is_the_one_that_was_asked_for(strategy: str, kind: type) -> None:
    settings = {"accelerator": "cpu", "devices": 2, "strategy": strategy}
    assert type(make_trainer(settings, max_epochs=1).strategy) is kind
