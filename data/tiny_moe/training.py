"""Training loop of the recipe: token streams in, trained weights out.

Knows nothing of files, domains' names or the tokenizer.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.tiny_moe.router_loss import RouterLoss, RouterTargets
from data.tiny_moe.routing import RouterTap
from data.tiny_moe.topology import MoECausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What the loop needs to know.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences per step.
        seq_len: Tokens per sequence.
        peak_lr: Learning rate after warm-up; falls linearly to 0.
        warmup: Share of the run that warms up.
        weight_decay: On matrices other than embeddings and routers.
        max_seconds: The schedule is cut short so that training ends by then; 0 means no limit. It
            runs from the end of the first step, which compiles: a warm-up must not pass in that.
        compile_layers: Run the decoder layers through torch.compile.
        seed: Of batch sampling.
    """

    steps: int
    batch_size: int
    seq_len: int
    peak_lr: float = 4e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    max_seconds: float = 0.0
    compile_layers: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How the run went, with a row of the curve for every hundredth of it.

    `seconds` is all of it, `first_step_s` the part that the first step took, with compilation.
    """

    steps: int
    tokens: int
    seconds: float
    first_step_s: float
    curve: list[dict[str, float]]


def train(
    model: MoECausalLM,
    streams: list[np.ndarray],
    weights: np.ndarray,
    settings: TrainSettings,
    targets: RouterTargets,
) -> TrainReport:
    """Train in place; bfloat16 autocast on a GPU, float32 on a CPU, master weights float32.

    Each sequence is a random window of one domain's stream, the domain drawn by `weights`; so
    every batch mixes domains and the load is balanced over the mixture, not within a domain.

    Args:
        model: Float32 weights, on the device to train on.
        streams: Per domain, uint16 token ids.
        weights: Per domain, the probability that a sequence comes from it.
        settings: See `TrainSettings`.
        targets: What the routers should come to; `seq_len` must be a multiple of its `chunk`.

    Raises:
        ValueError: If a domain is shorter than one sequence, or a sequence is no whole number of
            passages.
        FloatingPointError: If the loss stops being finite.
    """
    if settings.seq_len % targets.chunk:
        raise ValueError(f"seq_len={settings.seq_len} is not a multiple of {targets.chunk}")
    device = model.device
    batches = _batches(streams, weights, settings, device)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, settings.weight_decay),
        lr=settings.peak_lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    if settings.compile_layers:
        for layer in model.model.layers:
            layer.compile()
    router_loss = RouterLoss(
        num_layers=model.config.num_hidden_layers,
        num_experts=model.config.num_experts,
        device=device,
        targets=targets,
    )
    model.train()
    curve: list[dict[str, float]] = []
    log_every = max(1, settings.steps // 100)
    started = time.perf_counter()
    step, progress, first_step_s = 0, 0.0, 0.0
    with RouterTap(model) as tap, tqdm(total=settings.steps, unit="step") as bar:
        while progress < 1.0:
            lr = settings.peak_lr * _lr_factor(progress, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ids_BT = next(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False)[0]
                logits_BTV = model.lm_head(hidden_BTD)
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())
            ids_LTK = tap.expert_ids_LTK()
            num_layers, _, top_k = ids_LTK.shape
            ids_LBTK = ids_LTK.view(num_layers, settings.batch_size, settings.seq_len, top_k)
            total = loss + router_loss(tap.logits_LTE(), ids_LBTK)
            torch.autograd.backward(total)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % log_every == 0:
                row = {"step": step, "loss": loss.item(), "lr": lr, **router_loss.summary()}
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"loss is {row['loss']} at step {step}")
                curve.append(row)
                bar.set_postfix({key: f"{value:.3g}" for key, value in row.items()})
            step += 1
            bar.update()
            elapsed_s = time.perf_counter() - started
            first_step_s = first_step_s or elapsed_s
            progress = step / settings.steps
            if 0 < settings.max_seconds <= elapsed_s:
                progress = 1.0
            elif settings.max_seconds:
                timed = (elapsed_s - first_step_s) / (settings.max_seconds - first_step_s)
                progress = max(progress, timed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if step < settings.steps:
        logger.warning("stopped after %d of %d steps: time limit", step, settings.steps)
    tokens = step * settings.batch_size * settings.seq_len
    return TrainReport(
        steps=step, tokens=tokens, seconds=seconds, first_step_s=first_step_s, curve=curve
    )


def _batches(
    streams: list[np.ndarray], weights: np.ndarray, settings: TrainSettings, device: torch.device
) -> Iterator[torch.Tensor]:
    window = settings.seq_len + 1
    lengths = np.array([len(stream) for stream in streams])
    if lengths.min() < window:
        raise ValueError(f"domain {lengths.argmin()} has {lengths.min()} tokens, below {window}")
    all_ids = torch.from_numpy(np.concatenate(streams).astype(np.int32)).to(device)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    offsets_T = torch.arange(window, device=device)
    rng = np.random.default_rng(settings.seed)
    while True:
        domains_B = rng.choice(len(streams), size=settings.batch_size, p=weights)
        first_B = starts[domains_B] + rng.integers(lengths[domains_B] - window + 1)
        rows_BT = torch.from_numpy(first_B).to(device)[:, None] + offsets_T
        yield all_ids[rows_BT].long()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "embed" in name or name.endswith("mlp.gate.weight")
        (plain if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _lr_factor(progress: float, settings: TrainSettings) -> float:
    if progress < settings.warmup:
        return (progress + 1 / settings.steps) / (settings.warmup + 1 / settings.steps)
    return (1 - progress) / (1 - settings.warmup)
