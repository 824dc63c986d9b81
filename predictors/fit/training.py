"""One way to make a Lightning trainer for every predictor that is trained.

Knows nothing of what is trained. Settings come from ``conf/trainer`` as plain values, so that a
predictor's own configuration (which its artifact keeps) does not depend on where it was trained.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

TrainerSettings = Mapping[str, Any]
"""Keyword arguments of `lightning.Trainer`: accelerator, devices, strategy, precision."""


class SpawnedDDP(DDPStrategy):  # type: ignore[misc,unused-ignore]
    """Lightning's ``ddp_spawn``, whose processes leave without the threads of a process group.

    Lightning 2.6 destroys a group of nccl when Python exits, and one of gloo not at all. Its
    threads outlive the interpreter, and now and then one of them aborts the process ("terminate
    called without an active exception"), which fails a fit that had finished.
    """

    def __init__(self) -> None:
        super().__init__(start_method="spawn")

    def teardown(self) -> None:
        """Called in each spawned process, after its last collective, also after an exception."""
        super().teardown()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def make_trainer(
    settings: TrainerSettings | None,
    *,
    max_epochs: int,
    prefer_bf16: bool = False,
    callbacks: list[Callback] | None = None,
) -> lightning.Trainer:
    """A trainer that writes nothing to disk; what it trained is exported as an artifact.

    Args:
        settings: As above; None lets Lightning choose one device. The strategy "ddp_spawn" is run
            as `SpawnedDDP`, every other one as Lightning has it.
        max_epochs: At least 1.
        prefer_bf16: Unless the settings name a precision, multiply in bfloat16 where the device is
            faster in it: for networks large enough to be bound by multiplications.
        callbacks: More of them.
    """
    chosen = {"accelerator": "auto", "devices": 1, **(settings or {})}
    if prefer_bf16 and "precision" not in chosen and _is_bf16_fast(chosen["accelerator"]):
        chosen["precision"] = "bf16-mixed"
    if chosen.get("strategy") == "ddp_spawn":
        chosen["strategy"] = SpawnedDDP()
    return lightning.Trainer(
        **chosen,
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def device_of(settings: TrainerSettings | None) -> torch.device:
    """Where a trainer of these settings trains; the CPU if it is on several devices.

    Examples that are made there need no copy. Several devices are processes of their own, each of
    which is sent all examples.
    """
    trainer = make_trainer(settings, max_epochs=1)
    return torch.device("cpu") if trainer.world_size > 1 else trainer.strategy.root_device


@contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Around `Trainer.fit`: without what it says of every fit here and nobody can change."""
    with warnings.catch_warnings():
        # Examples are in memory, or come from a running model: no other process could help.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        # Lightning 2.6 asks torch 2.13 for a class that is on its way out.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def _is_bf16_fast(accelerator: str) -> bool:
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Absent before torch 2.12; without it a CPU is taken at its word of float32.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
