"""Serve a model with its experts offloaded, to any OpenAI client.

python serve.py                                 # embedded model, newest artifact, 25 % resident
python serve.py model=Qwen/Qwen3-30B-A3B budget=12GiB artifact=outputs/artifacts/mine
python serve.py policy=lru                      # no forecasts: the usual cache
python serve.py device=cpu                      # although there is a GPU
python serve.py serve.port=9000
python serve.py serve.host=0.0.0.0 serve.api_key_file=keys.txt  # for other machines, with a key
python serve.py serve.mode=resident_only serve.task_profile=outputs/profile     # LOSSY
python serve.py --check                         # compare with the resident model, and exit
"""

import logging
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from omegaconf import DictConfig

from conf import schema
from conf.build import build, expand_shorthand, plain, set_threads
from data.adapters import spec_of
from data.errors import MoecastError
from data.models import load_model
from data.schema import MoESpec
from predictors.artifact import artifact_digest, load_artifact, read_manifest
from predictors.base import Predictor
from predictors.task_profile import TaskProfile
from predictors.task_profile_file import load_profile
from runtime.attach_checks import MODES, pick_device
from runtime.budget import parse_budget
from runtime.check import CHECK_PROMPT, Recording, compare, format_check, record
from runtime.engine import attach
from runtime.forecasts import FALLBACK_POLICY
from runtime.offload import Offload
from runtime.policies import make_policy
from runtime.policies.base import Policy
from runtime.resident_planner import ResidentPlanner
from runtime.scheduler import StepCosts
from runtime.server.app import create_app
from runtime.server.artifact_reload import ArtifactReloader, hear_hangups
from runtime.server.generation import GenerationEngine
from runtime.server.logs import use_format
from runtime.server.objectives import Objectives
from runtime.server.options import Limits, ServerOptions
from runtime.server.overlap import OVERLAP
from runtime.server.path_choice import MODES as ENGINES
from runtime.server.path_choice import Mode
from runtime.server.recording import open_recording
from runtime.server.run import bind, serve
from runtime.server.security import check_exposure, load_api_keys
from runtime.server.slo import SLO

log = logging.getLogger("serve")


class Chosen(NamedTuple):
    """What decides about residency, and by which artifact.

    Attributes:
        policy: What to keep.
        predictor: Whose forecasts it reads; None for none.
        digest: `artifact_digest` of the artifact that it was read from, if a new one may follow it.
        profile: Of tasks, where the mode is "resident_only"; the policy then decides nothing.
    """

    policy: Policy
    predictor: Predictor | None = None
    digest: str | None = None
    profile: TaskProfile | None = None


def newest_artifact(folder: Path, spec: MoESpec, *, level: int = logging.INFO) -> Path | None:
    """The artifact written last among those in ``folder`` that were made for this model.

    Those of other models are passed over with a line in the log, of the given level.
    """
    manifests = sorted(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for artifact in (manifest.parent for manifest in reversed(manifests)):
        if (mismatch := read_manifest(artifact).spec.spec().mismatch(spec)) is None:
            return artifact
        log.log(level, "artifact %s passed over, it is for another model: %s", artifact, mismatch)
    return None


def place(cfg: DictConfig, spec: MoESpec, device: torch.device) -> dict[str, Any]:
    """What `attach` is told of device and memory; on a GPU, bytes are of everything there."""
    names = ("compile_layers", "cpu_lane", "prefetch")
    options = {name: cfg[name] for name in names}
    return options | _memory(cfg, spec, device)


def _memory(cfg: DictConfig, spec: MoESpec, device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        slots = parse_budget(cfg.budget, spec)
        return {"device": device, "slots": slots, "store_dir": cfg.paths.expert_store}
    placed = {"device": device, "context_tokens": cfg.serve.context_tokens}
    if _is_share(cfg):
        return placed | {"slots": parse_budget(cfg.budget, spec)}
    return placed | {"budget_bytes": cfg.budget}


def engine_mode(cfg: DictConfig, device: torch.device) -> Mode:
    """How sequences run; a GPU's budget in bytes has the KV cache of one sequence in it.

    Raises:
        ValueError: A value is not allowed, or sequences shall run together where that was not
            planned for.
    """
    if cfg.cpu_lane not in (False, True, "auto"):
        raise ValueError(f"cpu_lane={cfg.cpu_lane}: must be one of false, true, auto")
    if cfg.prefetch not in (False, True, "auto"):
        raise ValueError(f"prefetch={cfg.prefetch}: must be one of false, true, auto")
    mode: Mode = cfg.serve.engine
    if mode not in ENGINES:
        raise ValueError(f"serve.engine={mode}: must be one of {', '.join(ENGINES)}")
    if is_lossy(cfg, device):
        if mode == "auto":
            log.info("serve.engine=auto: one after the other, so that each has its own residents")
        return "single" if mode == "auto" else mode
    if device.type == "cpu" or _is_share(cfg):
        return mode
    if mode == "batched":
        raise ValueError(
            f"serve.engine=batched: budget={cfg.budget} on a GPU holds the KV cache of one "
            "sequence; give serve.engine=single, or the budget as a share of the experts"
        )
    if mode == "auto":
        log.warning(
            "budget=%s holds the KV cache of one sequence: they run one after the other", cfg.budget
        )
    return "single"


def objectives_of(cfg: DictConfig) -> Objectives | None:
    """What the scheduler keeps; None where it keeps none.

    Raises:
        ValueError: A value is not allowed, or nobody would keep what is asked.
    """
    slo = plain(cfg.serve.slo)
    seconds = {name: slo[name] for name in ("ttft_s", "tpot_s") if slo[name] is not None}
    costs_s = slo["step_costs_s"]
    if cfg.serve.scheduler != SLO:
        for name, value in {**seconds, "step_costs_s": costs_s}.items():
            if value is not None:
                raise ValueError(
                    f"serve.slo.{name}={value}: serve.scheduler={cfg.serve.scheduler} keeps no "
                    f"objectives; only serve.scheduler={SLO} does"
                )
        return None
    if cfg.serve.engine == "single":
        raise ValueError(
            f"serve.scheduler={SLO}: with serve.engine=single, sequences run as they come; give "
            "serve.engine=batched or auto"
        )
    for name, value in seconds.items():
        if not _is_number(value):
            raise ValueError(f"serve.slo.{name}={value}: must be a number of seconds, or null")
    costs = None
    if costs_s is not None:
        if not isinstance(costs_s, list) or len(costs_s) != 3 or not all(map(_is_number, costs_s)):
            raise ValueError(
                f"serve.slo.step_costs_s={costs_s}: must be [step, sequence, prompt token], in "
                "seconds, or null"
            )
        fixed_s, sequence_s, prompt_token_s = costs_s
        costs = StepCosts(fixed_s=fixed_s, sequence_s=sequence_s, prompt_token_s=prompt_token_s)
    max_overtaken = slo["max_overtaken"]
    if not isinstance(max_overtaken, int):
        raise ValueError(f"serve.slo.max_overtaken={max_overtaken}: must be a whole number")
    return Objectives(**seconds, costs=costs, max_overtaken=max_overtaken)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_lossy(cfg: DictConfig, device: torch.device) -> bool:
    """Whether the mode is "resident_only", with everything that this needs.

    Raises:
        ValueError: The mode is unknown, or goes with nothing else that is asked for.
    """
    mode = cfg.serve.mode
    if mode not in MODES:
        raise ValueError(f"serve.mode={mode}: must be one of {', '.join(MODES)}")
    if mode == "lossless":
        if cfg.serve.task_profile:
            raise ValueError(
                f"serve.task_profile={cfg.serve.task_profile}: only for serve.mode=resident_only"
            )
        return False
    for is_wrong, why in (
        (device.type != "cpu", f"device={device}: only a CPU serves so; give device=cpu"),
        (not cfg.serve.task_profile, "needs serve.task_profile; python -m runtime.profile_tasks"),
        (cfg.check, "--check: answers are not the resident model's, there is nothing to compare"),
        (cfg.serve.record, "serve.record: routing is not the model's own, and no trace of it"),
        (
            cfg.serve.engine == "batched" and cfg.serve.resident_period == 1,
            "serve.engine=batched: serve.resident_period=1 would make batches of one; give more",
        ),
        (
            cfg.serve.engine == "batched" and bool(cfg.artifact),
            "serve.engine=batched and an artifact: it would learn from requests that run alone",
        ),
        (
            bool(cfg.artifact) and cfg.serve.artifact_reload_s > 0,
            "serve.artifact_reload_s: its artifact is read once; give 0",
        ),
        (
            cfg.serve.scheduler == OVERLAP,
            f"serve.scheduler={OVERLAP}: nothing is forecast for who waits",
        ),
    ):
        if is_wrong:
            raise ValueError(f"serve.mode=resident_only with {why}")
    return True


def _is_share(cfg: DictConfig) -> bool:
    return bool(cfg.budget.strip().endswith("%"))


def find_artifact(cfg: DictConfig, spec: MoESpec, *, level: int = logging.INFO) -> Path | None:
    """The artifact that the configuration names, or the newest that fits the model."""
    if cfg.artifact:
        return Path(cfg.artifact)
    return newest_artifact(Path(cfg.paths.artifacts), spec, level=level)


def server_options(cfg: DictConfig) -> ServerOptions:
    """What the operator decided; ValueError where the server would be open to strangers."""
    options = ServerOptions(
        api_keys=load_api_keys(cfg.serve.api_key_file, os.environ),
        open_metrics=cfg.serve.open_metrics,
        limits=Limits(**plain(cfg.serve.limits)),
    )
    check_exposure(cfg.serve.host, options.api_keys)
    return options


def choose_residents(cfg: DictConfig, spec: MoESpec) -> Chosen:
    """For the lossy mode: the profile of tasks, and the predictor if an artifact is named."""
    policy: Policy = build(cfg.policy)
    profile = load_profile(Path(cfg.serve.task_profile), expect=spec)
    predictor = load_artifact(Path(cfg.artifact), expect=spec) if cfg.artifact else None
    log.warning(
        "Mode resident_only (LOSSY): who is resident follows the tasks %s; policy %s is not asked",
        ", ".join(profile.tasks),
        policy.name,
    )
    return Chosen(policy, predictor, profile=profile)


def attached(cfg: DictConfig, model: Any, chosen: Chosen, placed: dict[str, Any]) -> Offload:
    """The model with its experts offloaded, in the mode asked for."""
    if chosen.profile is None:
        return attach(model, policy=chosen.policy, predictor=chosen.predictor, **placed)
    scores_LE = chosen.profile.use_GLE.mean(dim=0)
    return attach(model, mode=cfg.serve.mode, resident_scores_LE=scores_LE, **placed)


def plan_residents(
    cfg: DictConfig, engine: GenerationEngine, offload: Offload, chosen: Chosen
) -> None:
    """Let residents follow the requests, where the mode is lossy."""
    if chosen.profile is None:
        return
    planner = ResidentPlanner(
        profile=chosen.profile,
        slots=offload.slots,
        period=cfg.serve.resident_period,
        skip_loss=cfg.serve.resident_skip_loss,
        min_agreement=cfg.serve.resident_min_agreement,
        predictor=chosen.predictor,
    )
    offload.plan_residents(planner, waiting=engine.waiting_prompts)


def choose_policy(cfg: DictConfig, spec: MoESpec) -> Chosen:
    """The policy asked for with the artifact that it reads, or the fallback where there is none."""
    if cfg.serve.mode != "lossless":
        return choose_residents(cfg, spec)
    policy: Policy = build(cfg.policy)
    if policy.foresight != "forecast":
        return Chosen(policy)
    folder = Path(cfg.paths.artifacts)
    artifact = find_artifact(cfg, spec)
    if artifact is None:
        log.warning(
            "no artifact for %s in %s: policy %s instead of %s; python train.py makes one",
            spec.describe(),
            folder,
            FALLBACK_POLICY,
            policy.name,
        )
        return Chosen(make_policy(FALLBACK_POLICY))
    try:
        digest = artifact_digest(artifact)  # before it is read: what comes later is another one
        predictor = load_artifact(artifact, expect=spec)
    except FileNotFoundError as error:
        raise ValueError(
            f"artifact={artifact}: {error}; give the folder of an exported predictor, null for the "
            f"newest in {folder}, or policy=lru, which needs none"
        ) from None
    log.info("artifact %s: predictor %s", artifact, predictor.kind)
    return Chosen(policy, predictor, digest)


def run(cfg: DictConfig) -> int:
    """Load, attach, serve until a signal, detach; or check. Returns the exit status.

    What can be wrong with the settings is found before the model is loaded, which takes minutes.
    """
    use_format(cfg.serve.log, logging.getLogger().handlers)
    options, device = server_options(cfg), pick_device(cfg.device)
    mode, objectives = engine_mode(cfg, device), objectives_of(cfg)
    with ExitStack() as stack:
        reserved = None
        if not cfg.check:
            reserved = stack.enter_context(bind(cfg.serve.host, cfg.serve.port))
            stack.enter_context(hear_hangups())
        set_threads(cfg.model)
        model, tokenizer = load_model(
            cfg.model.id, dtype=cfg.model.dtype, revision=cfg.model.revision
        )
        spec = spec_of(model, model_id=cfg.model.id)
        chosen = choose_policy(cfg, spec)
        resident = None
        if reserved is None:
            resident = record(model, tokenizer(CHECK_PROMPT).input_ids)
        recorder = None
        if cfg.serve.record and reserved is not None:
            recorder = open_recording(
                Path(cfg.serve.record),
                model,
                model_id=cfg.model.id,
                prompts=cfg.serve.record_prompts,
                max_requests=cfg.serve.record_max_requests,
            )
        offload = stack.enter_context(attached(cfg, model, chosen, place(cfg, spec, device)))
        if resident is not None:
            return check(model, offload, resident)
        assert reserved is not None
        engine = GenerationEngine(
            model=model,
            tokenizer=tokenizer,
            offload=offload,
            max_queue=cfg.serve.max_queue,
            max_context_tokens=cfg.serve.context_tokens or offload.context_tokens,
            mode=mode,
            max_batch=cfg.serve.max_batch,
            kv_tokens=cfg.serve.kv_tokens,
            scheduler=cfg.serve.scheduler,
            objectives=objectives,
            recorder=recorder,
            group_requests=None if chosen.profile is None else cfg.serve.resident_period,
        )
        plan_residents(cfg, engine, offload, chosen)
        if chosen.digest is not None:
            reloader = ArtifactReloader(
                find=partial(find_artifact, cfg, spec, level=logging.DEBUG),
                served=chosen.digest,
                spec=spec,
                swap=lambda new: engine.between_steps(partial(offload.swap_predictor, new)),
                poll_s=cfg.serve.artifact_reload_s,
            )
            engine.reloader = stack.enter_context(reloader)
        app = create_app(engine, model_name=cfg.model.id, options=options)
        serve(app, reserved=reserved, drain_s=cfg.serve.drain_s)
    return 0


def check(model: Any, offload: Offload, resident: Recording) -> int:
    """Compare the offloaded model with what it was when resident; the exit status."""
    offload.begin_request(CHECK_PROMPT)
    start = resident.num_prompt_tokens
    prompt_ids, answer_ids = resident.token_ids[:start], resident.token_ids[start:]
    result = compare(resident, record(model, prompt_ids, answer_ids=answer_ids))
    print(format_check(result))
    return 0 if result.passed else 1


@hydra.main(version_base="1.3", config_path="conf", config_name="serve")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    try:
        status = run(cfg)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        log.debug("raised here:", exc_info=error)  # hydra.verbose=true shows it
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    schema.register()
    sys.argv[1:] = expand_shorthand(sys.argv[1:])
    main()
