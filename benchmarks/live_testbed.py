"""Testbed "live": a trained model, end to end through `attach` and ``model.generate``.

Every configuration generates greedily from the same prompts: the stock model first, then the
attached one with all experts in slots, then with fewer. What must hold is checked on real logits:
where an expert lies must not change a bit, so all residencies and policies must equal the attached
model with every expert resident; against stock transformers, whose sums are ordered otherwise, the
tokens are compared, and where they part the stock model's own margin says if it was a near-tie.

Knows nothing of forced routing; speed here is that of a small model, and says little about links.

Shape letters: B requests · T tokens · V vocabulary.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.record import spread
from data.adapters import spec_of
from data.machine import hardware
from data.models import load_model
from data.sources.stdlib import Stdlib
from runtime.budget import slots_at
from runtime.engine import attach

PROMPTS = 4
PROMPT_TOKENS = 24


class Generated(NamedTuple):
    """What one configuration said to every prompt, and how fast."""

    token_ids: list[Tensor]  # [T] each, new tokens only
    logits: list[Tensor]  # [T, V] float32 each
    tokens_per_s: dict[str, float]


def measure_live(
    where: str,
    *,
    device: torch.device,
    dtype: str,
    residencies: Sequence[float],
    policies: Sequence[str],
    repeats: int,
    tokens: int,
) -> dict[str, Any]:
    """Generate with every policy at every residency and compare.

    Args:
        where: tiny_moe, a folder or a hub id.
        device: Where the attached model runs.
        dtype: Of the weights.
        residencies: Shares of the experts with a slot.
        policies: Names of policies that need no foresight.
        repeats: Of every configuration, to be timed.
        tokens: New tokens for each prompt.
    """
    model, tokenizer = load_model(where, dtype=dtype)
    spec = spec_of(model)
    model = model.to(device)
    prompts = [ids_BT.to(device) for ids_BT in _prompts(tokenizer)]

    def run() -> Generated:
        return _generate(model, prompts, tokens=tokens, repeats=repeats)

    stock = run()
    rows = [_row("stock", 1.0, spec.num_experts, stock, stock, None)]
    reference: Generated | None = None
    for residency in (1.0, *residencies):
        slots = slots_at(residency, spec)
        for policy in policies[:1] if residency == 1.0 else policies:
            with attach(model, slots=slots, policy=policy) as offload:
                said = run()
                stats = offload.stats()
            reference = reference or said
            row = _row(f"attached, {policy}", residency, slots, said, stock, reference)
            rows.append(row | {"hit_ratio": stats.hit_ratio, "miss_bytes": stats.miss_bytes})
            print(f"{row['row']:>18} {residency:5.0%} {row['tokens_per_s']}", flush=True)
    return {
        "testbed": "live",
        "model": dataclasses.replace(spec, model_id=Path(where).name).describe(),
        "hardware": hardware(),
        "prompts": len(prompts),
        "rows": rows,
        "complete": True,
    }


def _prompts(tokenizer: Any) -> Iterator[Tensor]:
    """The beginnings of a few of the standard library's docstrings."""
    for prompt in Stdlib(num_prompts=PROMPTS).prompts():
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        yield ids[:, :PROMPT_TOKENS]


def _generate(model: Any, prompts: Sequence[Tensor], *, tokens: int, repeats: int) -> Generated:
    """Answer every prompt; once untimed (kernels compile, graphs are captured), then timed."""
    rates: list[float] = []
    answers: list[Any] = []
    for repeat in range(repeats + 1):
        _wait(model.device)
        started_s = time.perf_counter()
        answers = [
            model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for ids_BT in prompts
        ]
        _wait(model.device)
        if repeat:
            rates.append(tokens * len(prompts) / (time.perf_counter() - started_s))
    return Generated(
        token_ids=[
            answer.sequences[0, ids_BT.shape[1] :].cpu()
            for answer, ids_BT in zip(answers, prompts, strict=True)
        ],
        logits=[torch.cat(answer.logits).float().cpu() for answer in answers],
        tokens_per_s=spread(rates),
    )


def _row(
    name: str,
    residency: float,
    slots: int,
    said: Generated,
    stock: Generated,
    reference: Generated | None,
) -> dict[str, Any]:
    """A configuration against the stock model (its tokens) and the reference (its bits).

    Returns:
        Plain values. ``same_tokens`` counts those that equal the stock model's up to the first
        difference in each answer; ``margins_where_parted`` has, for each answer that parts, the
        stock model's lead of its first choice over its second there, in units of the spread of its
        logits.
    """
    same, margins = 0, []
    for ours_T, theirs_T, logits_TV in zip(
        said.token_ids, stock.token_ids, stock.logits, strict=True
    ):
        differs = (ours_T != theirs_T).nonzero()
        first = int(differs[0, 0]) if len(differs) else len(theirs_T)
        same += first
        if len(differs):
            best = logits_TV[first].topk(2).values
            margins.append(float((best[0] - best[1]) / logits_TV[first].std()))
    exact = None
    if reference is not None:
        exact = all(map(torch.equal, said.logits, reference.logits))
    return {
        "row": name,
        "residency": residency,
        "slots": slots,
        "tokens_per_s": said.tokens_per_s,
        "exact": exact,
        "finite": all(bool(logits_TV.isfinite().all()) for logits_TV in said.logits),
        "same_tokens": same,
        "tokens": sum(map(len, stock.token_ids)),
        "margins_where_parted": margins,
        "median_margin": statistics.median(
            float((top[0] - top[1]) / logits_V.std())
            for logits_TV in stock.logits
            for logits_V in logits_TV
            for top in [logits_V.topk(2).values]
        ),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
