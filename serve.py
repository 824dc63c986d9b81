"""Serve a model with its experts offloaded, to any OpenAI client.

python serve.py                                 # embedded model, newest artifact, 25 % resident
python serve.py model=Qwen/Qwen3-30B-A3B budget=12GiB artifact=outputs/artifacts/mine
python serve.py policy=lru                      # no forecasts: the usual cache
python serve.py serve.port=9000
"""

import logging
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from conf import schema
from conf.build import build, expand_shorthand, set_threads
from data.adapters import spec_of
from data.errors import MoecastError
from data.models import load_model
from data.schema import MoESpec
from predictors.artifact import load_artifact, read_manifest
from runtime.budget import parse_budget
from runtime.engine import attach
from runtime.policies import make_policy
from runtime.policies.base import Policy
from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.run import serve

log = logging.getLogger("serve")

FALLBACK_POLICY = "lfru"  # the best heuristic that needs no forecast, on every trace measured


def newest_artifact(folder: Path, spec: MoESpec) -> Path | None:
    """The artifact written last among those in ``folder`` that were made for this model."""
    manifests = sorted(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for artifact in (manifest.parent for manifest in reversed(manifests)):
        if (mismatch := read_manifest(artifact).spec.spec().mismatch(spec)) is None:
            return artifact
        log.info("artifact %s passed over, it is for another model: %s", artifact, mismatch)
    return None


def run(cfg: DictConfig) -> None:
    """Load, attach, serve until a signal, detach."""
    set_threads(cfg.model)
    model, tokenizer = load_model(cfg.model.id, dtype=cfg.model.dtype, revision=cfg.model.revision)
    spec = spec_of(model, model_id=cfg.model.id)
    policy: Policy = build(cfg.policy)
    predictor = None
    if policy.foresight == "forecast":
        folder = Path(cfg.paths.artifacts)
        artifact = Path(cfg.artifact) if cfg.artifact else newest_artifact(folder, spec)
        if artifact is None:
            log.warning(
                "no artifact for %s in %s: policy %s instead of %s; python train.py makes one",
                spec.describe(),
                folder,
                FALLBACK_POLICY,
                policy.name,
            )
            policy = make_policy(FALLBACK_POLICY)
        else:
            predictor = load_artifact(artifact, expect=spec)
            log.info("artifact %s: predictor %s", artifact, predictor.kind)
    with attach(
        model,
        policy=policy,
        slots=parse_budget(cfg.budget, spec),
        predictor=predictor,
        store_dir=cfg.paths.expert_store,
    ) as offload:
        engine = GenerationEngine(
            model=model, tokenizer=tokenizer, offload=offload, max_queue=cfg.serve.max_queue
        )
        app = create_app(engine, model_name=cfg.model.id)
        serve(app, host=cfg.serve.host, port=cfg.serve.port, drain_s=cfg.serve.drain_s)


@hydra.main(version_base="1.3", config_path="conf", config_name="serve")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    try:
        run(cfg)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        log.debug("raised here:", exc_info=error)  # hydra.verbose=true shows it
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    schema.register()
    sys.argv[1:] = expand_shorthand(sys.argv[1:])
    main()
