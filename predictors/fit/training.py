"""One way to make a Lightning trainer for every predictor that is trained.

Knows nothing of what is trained. Settings come from ``conf/trainer`` as plain values, so that a
predictor's own configuration (which its artifact keeps) does not depend on where it was trained.
"""

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

TrainerSettings = Mapping[str, Any]
"""Keyword arguments of `lightning.Trainer`: accelerator, devices, strategy, precision."""


def make_trainer(
    settings: TrainerSettings | None, *, max_epochs: int, callbacks: list[Callback] | None = None
) -> lightning.Trainer:
    """A trainer that writes nothing to disk; what it trained is exported as an artifact.

    Args:
        settings: As above; None lets Lightning choose one device.
        max_epochs: At least 1.
        callbacks: More of them.
    """
    return lightning.Trainer(
        **{"accelerator": "auto", "devices": 1, **(settings or {})},
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
