"""One way to make a Lightning trainer for every predictor that is trained.

Knows nothing of what is trained. Settings come from ``conf/trainer`` as plain values, so that a
predictor's own configuration (which its artifact keeps) does not depend on where it was trained.
"""

from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

TrainerSettings = Mapping[str, Any]
"""Keyword arguments of `lightning.Trainer`: accelerator, devices, strategy, precision."""


def make_trainer(
    settings: TrainerSettings | None, *, max_epochs: int, callbacks: list[Callback] | None = None
) -> lightning.Trainer:
    """A trainer that writes nothing to disk; what it trained is exported as an artifact.

    Args:
        settings: As above; None lets Lightning choose one device. The precision "auto", also the
            default, is bfloat16 where the device multiplies it faster than float32.
        max_epochs: At least 1.
        callbacks: More of them.
    """
    chosen = {"accelerator": "auto", "devices": 1, "precision": "auto", **(settings or {})}
    if chosen["precision"] == "auto":
        chosen["precision"] = "bf16-mixed" if _is_bf16_fast(chosen["accelerator"]) else "32-true"
    return lightning.Trainer(
        **chosen,
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _is_bf16_fast(accelerator: str) -> bool:
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Absent before torch 2.12; without it a CPU is taken at its word of float32.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
