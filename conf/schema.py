"""The keys of each root configuration with their types, so that ``sed=3`` or ``seed=banana`` fails.

Groups are checked by the constructors that their YAML names.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

STAGES = ("collect", "fit", "evaluate", "export")


@dataclass
class CollectSettings:
    """How routing is collected; all of it is part of the trace store's identity."""

    max_prompt_tokens: int = 96
    max_new_tokens: int = 32
    batch_size: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    keep_router_probs: bool = False


@dataclass
class EvaluateSettings:
    """What a predictor is measured at."""

    residencies: list[float] = field(default_factory=lambda: [0.25, 0.4, 0.5])
    lookaheads: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    baselines: list[str] = field(default_factory=lambda: ["previous_token", "popularity", "oracle"])
    policies: list[str] | None = None  # all that exist
    max_tokens: int | None = None
    cost_tokens: int = 256  # over which a predictor is timed
    prefetch_experts: int | None = None  # per layer and token, for wasted bytes; top-k


@dataclass
class CollectConfig:
    """Keys of ``python -m data.collect``."""

    model: Any = MISSING
    source: Any = MISSING
    collect: CollectSettings = field(default_factory=CollectSettings)
    paths: Any = MISSING
    seed: int = 0
    out: str | None = None


@dataclass
class TrainConfig:
    """Keys of ``python train.py``."""

    model: Any = MISSING
    source: Any = MISSING
    embedder: Any = MISSING
    predictor: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    paths: Any = MISSING
    collect: CollectSettings = field(default_factory=CollectSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    seed: int = 0


@dataclass
class ServeConfig:
    """Keys of ``python serve.py``."""

    model: Any = MISSING
    policy: Any = MISSING
    paths: Any = MISSING
    serve: Any = MISSING
    artifact: str | None = None
    budget: str = "25%"
    check: bool = False
    device: str = "auto"
    compile_layers: bool = False
    cpu_lane: Any = False
    prefetch: Any = False


def register() -> None:
    """Make the schemas known to Hydra under the names that the root YAMLs use."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="collect_schema", node=CollectConfig)
    store.store(name="serve_schema", node=ServeConfig)
