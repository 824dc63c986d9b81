"""What `runtime.engine.attach` refuses, before anything has changed.

Shape letters: E experts per layer · K experts per token · C slots.
"""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.adapters import MoELayer, expert_parameters
from data.errors import SpecMismatchError
from data.schema import MoESpec
from predictors.base import Predictor
from runtime.budget import check_slots, slots_for_bytes
from runtime.policies.base import Policy
from runtime.redivide import MeasuredSplit
from runtime.sizes import parse_bytes
from runtime.slot_split import SlotSplit

logger = logging.getLogger(__name__)

NAME_PREFIX = "moecast-"  # of the names under which models' expert functions are registered
DEVICES = ("auto", "cpu", "cuda")
MODES = ("lossless", "resident_only")


def pick_device(name: str) -> torch.device:
    """The device that a command's ``device=`` means: "auto" is a GPU where there is one.

    Raises:
        ValueError: It is none of `DEVICES`, or there is no GPU.
    """
    if name not in DEVICES:
        raise ValueError(f"device={name}: must be one of {', '.join(DEVICES)}")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError(
            "device=cuda: torch sees no GPU here; give device=cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def check_model(
    model: nn.Module, layers: Sequence[MoELayer], device: torch.device | str | None
) -> torch.device:
    """Where to serve; ValueError if the model is attached already or lies where it cannot be."""
    homes = {parameter.device for parameter in model.parameters()}
    for moe in layers:
        config: Any = moe.experts.config
        if str(config._experts_implementation).startswith(NAME_PREFIX):
            raise ValueError(
                "the model, or one on the same config object, is attached already: detach it first"
            )
        for name, parameter in expert_parameters(moe.experts):
            if parameter.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"{name} of layer {moe.layer} is on {parameter.device}: experts are served "
                    "from the CPU or a CUDA device; load the model on one of them"
                )
    if len(homes) > 1:
        raise ValueError(f"the model is on {sorted(map(str, homes))}: load it on one device")
    home = homes.pop()
    target = home if device is None else torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: there is no CUDA device that torch can use")
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    if target.type not in ("cpu", "cuda") or (home.type == "cuda" and target != home):
        raise ValueError(
            f"device={device} with a model on {home}: it can be served where it is, or from the "
            "CPU on a CUDA device"
        )
    return target


def slots_per_layer(
    spec: MoESpec, slots: int | Sequence[int] | None, budget_bytes: int | str | None
) -> tuple[int, ...]:
    """C of each layer, as told or as the budget pays for."""
    if (slots is None) == (budget_bytes is None):
        raise ValueError(
            f"slots={slots} and budget_bytes={budget_bytes}: give exactly one of them; "
            f"{spec.describe()} can have {spec.top_k}..{spec.num_experts} slots per layer"
        )
    if budget_bytes is not None:
        slots = slots_for_bytes(parse_bytes(budget_bytes), spec)
    given = (slots,) * spec.num_layers if isinstance(slots, int) else tuple(slots or ())
    if len(given) != spec.num_layers:
        raise ValueError(
            f"slots has {len(given)} entries: {spec.describe()} needs one number, or one per layer"
        )
    for num_slots in given:
        check_slots(num_slots, spec)
    return given


def check_foresight(policy: Policy, predictor: Predictor | None) -> None:
    """ValueError unless the policy is told of the future what it reads."""
    if policy.foresight == "truth":
        raise ValueError(
            f"policy {policy.name!r} needs to know the future: only the simulator can run it"
        )
    if policy.foresight == "forecast" and predictor is None:
        raise ValueError(f"policy {policy.name!r} reads forecasts: give a predictor")
    if policy.foresight == "none" and predictor is not None:
        logger.warning(
            "Policy %s reads no forecasts: predictor %s is not run", policy.name, predictor.kind
        )


def check_spec(predictor: Predictor, spec: MoESpec) -> None:
    """Raise unless the predictor was fitted for this model."""
    if predictor.spec is None:
        raise ValueError(f"predictor {predictor.kind!r} is not fitted: fit or load it first")
    if difference := predictor.spec.mismatch(spec):
        raise SpecMismatchError(
            f"predictor {predictor.kind!r} was fitted for another model: {difference}"
        )


def check_mode(
    mode: str,
    *,
    device: torch.device,
    spec: MoESpec,
    predictor: Predictor | None,
    scores_LE: Tensor | None,
) -> None:
    """ValueError unless everything that the mode needs is there, and nothing that it cannot use."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {list(MODES)}")
    if mode == "lossless":
        if scores_LE is not None:
            raise ValueError("resident_scores_LE: only for mode='resident_only', leave it out")
        return
    if device.type != "cpu":
        raise ValueError(f"mode={mode!r} with device={device}: only a CPU can serve so")
    if predictor is not None:
        raise ValueError(
            f"mode={mode!r} with predictor {predictor.kind!r}: what is resident is for "
            "`Offload.keep_resident` to say; give its forecasts there"
        )
    if scores_LE is None:
        raise ValueError(
            f"mode={mode!r}: give resident_scores_LE, such as each expert's share of past use: "
            "what is not resident at first is not used"
        )
    check_scores(scores_LE, spec)


def check_scores(scores_LE: Tensor, spec: MoESpec) -> None:
    """ValueError unless there is one score per expert."""
    if scores_LE.shape != (spec.num_layers, spec.num_experts) or scores_LE.isnan().any():
        raise ValueError(
            f"scores of shape {list(scores_LE.shape)}: must be numbers, "
            f"[{spec.num_layers}, {spec.num_experts}]"
        )


def check_split(split: SlotSplit | MeasuredSplit, *, device: torch.device, slots: object) -> None:
    """ValueError unless slots are split where they can be, and not told in two ways."""
    if device.type == "cpu":
        raise ValueError("split: only slots on a GPU can be, leave it out on a CPU")
    if slots is not None and isinstance(split, SlotSplit):
        raise ValueError(f"slots={slots} and split={split}: give one of them")


def check_gpu_options(device: torch.device, *, store_dir: object, record_events: bool) -> None:
    """ValueError for what only a CPU has, and where the kernels cannot run."""
    if store_dir is not None or record_events:
        raise ValueError(
            f"store_dir={store_dir}, record_events={record_events}: not supported on {device}; "
            "leave them out"
        )
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"device={device}: the kernels need triton, which comes with CUDA builds of torch; "
            "install it, or serve with device=cpu"
        )
