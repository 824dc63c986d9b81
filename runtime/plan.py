"""Says what fits before anything is loaded: slots, bytes and tokens per second for a budget.

    python -m runtime.plan model=FOLDER_OR_ID budget=12GiB
    python -m runtime.plan model=tiny_moe residency=0.5 trace=gptoss20b policy=[lru,lfru]
    python -m runtime.plan model=FOLDER budget=16GiB context=32768 link_gbps=25 compute_ms=6

Reads config.json and no weights. Memory is counted on the meta device (`runtime.footprint`) and
divided as `attach(budget_bytes=...)` divides it (`runtime.gpu_memory`). Hits come from replaying a
trace, or else from a rough curve, and it says which. The link is measured where there is a GPU, or
given. It ends with one line of JSON.

Two speeds are told: *bound*, transfers hidden behind compute or the other way round, and *serial*,
one after the other. Where compute was neither measured nor given it counts as nothing: both are
upper bounds then.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.errors import ModelNotFoundError, MoecastError
from data.importers import load_traces
from data.machine import memory_bytes
from data.models import DTYPES, EMBEDDED
from data.tables import format_table
from data.tiny_moe import TINY_MOE_DIR
from runtime.budget import slots_at
from runtime.expected_speed import expected_speed, resident_step_s, rough_hit_ratio
from runtime.footprint import Footprint, footprint, skeleton_of
from runtime.gpu_memory import (
    CHUNK_TOKENS,
    CONTEXT_TOKENS,
    STAGING_BUFFERS,
    MemoryPlan,
    free_bytes_of,
    plan_memory,
)
from runtime.link import LinkRates, LinkReport, measure_link
from runtime.sizes import parse_bytes

_GIB = 2**30


@dataclass
class Args:
    """Say what a budget of GPU memory gives, before anything is loaded.

    model: a folder, a hub id or tiny_moe; only its config is read. Give budget (of everything on
    the GPU) or residency (share of the experts with a slot). trace and artifact are replayed for
    the hit ratio; without them it is a rough curve. link_gbps and compute_ms (of a step with all
    experts resident) stand in for what cannot be measured here. device=cpu plans for another
    machine than this one.
    """

    model: str
    budget: str | None = None
    residency: float | None = None
    context: int = CONTEXT_TOKENS
    batch: int = 1
    chunk_tokens: int = CHUNK_TOKENS
    staging: int = STAGING_BUFFERS
    dtype: str = "auto"
    revision: str | None = None
    policy: list[str] = field(default_factory=lambda: ["lfru"])
    trace: str | None = None
    artifact: Path | None = None
    max_tokens: int = 20_000
    link_gbps: float | None = None
    compute_ms: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check what no one else checks."""
        if (self.budget is None) == (self.residency is None):
            raise ValueError("give either budget=12GiB or residency=0.5")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: must be one of {', '.join(DTYPES)}")
        for name in ("link_gbps", "compute_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")
        if self.artifact is not None and self.trace is None:
            raise ValueError("artifact: needs a trace to be replayed on")


def report(args: Args) -> dict[str, Any]:
    """Everything that the command says, as plain values.

    Raises:
        ValueError: The budget is impossible, or an argument is.
        MoecastError: There is no such model, or it has no routed experts.
    """
    device = torch.device(_device(args.device))
    model = _footprint(args, chunk_tokens=args.chunk_tokens)
    free_bytes = free_bytes_of(device) if device.type == "cuda" else None
    slots = None if args.residency is None else slots_at(args.residency, model.spec)
    budget_bytes = None if args.budget is None else parse_bytes(args.budget)
    plan = plan_memory(
        model, budget_bytes, slots=slots, staging_buffers=args.staging, free_bytes=free_bytes
    )
    budget_bytes = budget_bytes or plan.total_bytes
    measured = measure_link(device)
    link, link_source = _link(args, measured)
    compute_s, compute_source = _compute(args, model, measured)
    plans = _alternatives(model, plan, budget_bytes, args.staging)
    hits, hits_source = _hit_ratios(args, model, [p.slots for p in plans.values()])
    rows = []
    for name, alternative in plans.items():
        for policy, hit_ratio_of in hits.items():
            speed = expected_speed(
                model, hit_ratio_of[alternative.slots], link=link, compute_s=compute_s
            )
            rows.append(
                {
                    "what": name,
                    "policy": policy,
                    "total_bytes": alternative.total_bytes,
                    "slots": alternative.slots,
                    "residency": alternative.slots / model.spec.num_experts,
                    **dataclasses.asdict(speed),
                }
            )
    return {
        "model": model.spec.describe(),
        "dtype": str(model.layout.dtype).removeprefix("torch."),
        "budget_bytes": budget_bytes,
        "free_bytes": free_bytes,
        "context": model.context,
        "batch": model.batch,
        "chunk_tokens": model.chunk_tokens,
        "plan": {**dataclasses.asdict(plan), "total_bytes": plan.total_bytes},
        "least_bytes": plans["smallest"].total_bytes,
        "host_bytes": model.experts_bytes,
        "host_memory_bytes": memory_bytes(),
        "hit_ratio_from": hits_source,
        "link": None if link is None else dataclasses.asdict(link),
        "link_from": link_source,
        "compute_from": compute_source,
        "rows": rows,
        "advice": _advice(args, model, plan, budget_bytes),
    }


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name}: must be one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _footprint(args: Args, *, chunk_tokens: int) -> Footprint:
    where = str(TINY_MOE_DIR) if args.model == EMBEDDED else args.model
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        model = skeleton_of(where, dtype=dtype, revision=args.revision)
    except OSError as error:
        why = str(error).partition("\n")[0]
        raise ModelNotFoundError(
            f"model {args.model!r} is no folder with a config.json, nor to be had from the hub "
            f"({why}); its config.json alone is enough"
        ) from None
    return footprint(model, context=args.context, batch=args.batch, chunk_tokens=chunk_tokens)


def _link(args: Args, measured: LinkReport | None) -> tuple[LinkRates | None, str]:
    if args.link_gbps is not None:
        return LinkRates(bytes_per_s=args.link_gbps * 1e9), "given"
    if measured is None:
        return None, "not measured: no GPU here; give link_gbps"
    if measured.threads_bytes_per_s is None:
        return measured.engine, "measured, copy engine"
    # Decode reads what it misses by threads of the GPU, with no copy to be started.
    return LinkRates(bytes_per_s=measured.threads_bytes_per_s), "measured, GPU threads"


def _compute(args: Args, model: Footprint, measured: LinkReport | None) -> tuple[float | None, str]:
    if args.compute_ms is not None:
        return args.compute_ms / 1e3, "given"
    if measured is None:
        return None, "not measured: speeds are of the link alone; give compute_ms"
    return resident_step_s(model, measured.device_bytes_per_s), "bytes read at the memory's rate"


def _alternatives(
    model: Footprint, plan: MemoryPlan, budget_bytes: int, staging: int
) -> dict[str, MemoryPlan]:
    """The plan between the smallest, one with a GiB more, and everything resident."""
    return {
        "smallest": _smallest(model, staging),
        "this budget": plan,
        "+1 GiB": plan_memory(model, budget_bytes + _GIB, staging_buffers=staging),
        "all resident": plan_memory(
            model, None, slots=model.spec.num_experts, staging_buffers=staging
        ),
    }


def _smallest(model: Footprint, staging: int) -> MemoryPlan:
    """Slots for one token's experts."""
    return plan_memory(model, None, slots=model.spec.top_k, staging_buffers=staging)


def _hit_ratios(
    args: Args, model: Footprint, slots: Sequence[int]
) -> tuple[dict[str, dict[int, float]], str]:
    """Policy -> slots -> hit ratio, and where it is from."""
    spec = model.spec
    if args.trace is None:
        rough = {n: sum(rough_hit_ratio(n / spec.num_experts)) / 2 for n in slots}
        return {"lfru": rough}, "rough curve of two recorded models, +-10 points; give a trace"
    # What a plan without a trace does without, on machines that only serve.
    from predictors.artifact import load_artifact
    from runtime.simulate import simulate

    traces = load_traces(args.trace, num_experts=spec.num_experts)
    if difference := traces.spec.mismatch(spec):
        raise ValueError(f"trace={args.trace}: of another model: {difference}")
    counts = sorted({n for n in slots if n < spec.num_experts})
    predictor = None
    if args.artifact is not None:
        predictor = load_artifact(args.artifact, expect=traces.spec)
    hits: dict[str, dict[int, float]] = {policy: {spec.num_experts: 1.0} for policy in args.policy}
    if counts:
        results = simulate(
            traces,
            policies=args.policy,
            slots=counts,
            predictor=predictor,
            max_tokens=args.max_tokens,
            progress=False,
        )
        for result in results:
            assert result.slots is not None
            decoded = result.decode_hit_ratio
            hits[result.policy][result.slots] = result.hit_ratio if decoded is None else decoded
    said = f"replay of {args.trace}, {args.max_tokens} tokens, one request at a time"
    return hits, said


def _advice(args: Args, model: Footprint, plan: MemoryPlan, budget_bytes: int) -> list[str]:
    """What to change, and what each change gives."""
    spec = model.spec
    least_bytes = _smallest(model, args.staging).total_bytes
    said = [f"the smallest possible budget is {least_bytes / _GIB:.2f} GiB"]
    if plan.slots == spec.num_experts:
        said.append(f"every expert is resident; {plan.total_bytes / _GIB:.2f} GiB would do")
    else:
        saved = plan.kv_bytes // 2
        said.append(
            f"half the context saves {saved / _GIB:.2f} GiB of KV cache, "
            f"{saved / plan.slot_bytes:.1f} slots a layer"
        )
    if plan.slots < spec.num_experts and model.chunk_tokens > 256:
        smaller = _footprint(args, chunk_tokens=model.chunk_tokens // 2)
        saved = model.activation_bytes - smaller.activation_bytes
        said.append(
            f"chunk_tokens={model.chunk_tokens // 2} saves {saved / _GIB:.2f} GiB of activations, "
            f"{saved / plan.slot_bytes:.1f} slots a layer; prompts cross the link more often"
        )
    host_memory = memory_bytes()
    if host_memory is not None and model.experts_bytes > 0.9 * host_memory:
        said.append(
            f"the experts take {model.experts_bytes / _GIB:.1f} GiB of host memory; this machine "
            f"has {host_memory / _GIB:.1f} GiB"
        )
    if plan.slots < spec.num_experts - 1:
        missing = plan.slot_bytes - (budget_bytes - plan.total_bytes)
        said.append(f"{missing / _GIB:.2f} GiB more give one more slot in every layer")
    return said


def format_report(values: dict[str, Any]) -> str:
    """A table for people, between what it rests on and what to change."""
    plan = values["plan"]
    parts = {
        "other weights": plan["weight_bytes"],
        f"KV cache ({values['context']} tokens x {values['batch']})": plan["kv_bytes"],
        f"activations (chunks of {values['chunk_tokens']})": plan["activation_bytes"],
        "workspace and graphs": plan["workspace_bytes"] + plan["graph_bytes"],
        "staging": plan["staging_bytes"],
        "slots": plan["slots"] * plan["slot_bytes"],
    }
    memory = ", ".join(f"{name} {num_bytes / _GIB:.2f}" for name, num_bytes in parts.items())
    lines = [
        f"{values['model']}, {values['dtype']}",
        f"GiB on the GPU: {memory}; in all {plan['total_bytes'] / _GIB:.2f} of "
        f"{values['budget_bytes'] / _GIB:.2f}; host memory {values['host_bytes'] / _GIB:.2f}",
        f"hits: {values['hit_ratio_from']}",
        f"link: {values['link_from']}"
        + (f", {values['link']['bytes_per_s'] / 1e9:.1f} GB/s" if values["link"] else ""),
        f"compute: {values['compute_from']}",
    ]
    header = ["", "policy", "GiB", "slots", "resident %", "hit %", "MB/token", "tok/s", "serial"]
    cells = []
    for row in values["rows"]:
        speeds = (row["bound_tokens_per_s"], row["serial_tokens_per_s"])
        cells.append(
            [
                row["what"],
                row["policy"],
                f"{row['total_bytes'] / _GIB:.2f}",
                str(row["slots"]),
                f"{100 * row['residency']:.0f}",
                f"{100 * row['hit_ratio']:.1f}",
                f"{row['miss_bytes_per_token'] / 1e6:.1f}",
                *("-" if speed is None else f"{speed:.1f}" for speed in speeds),
            ]
        )
    return "\n".join([*lines, format_table(header, cells), *values["advice"]])


def main(argv: Sequence[str]) -> None:
    """Command line: a table for people, then one line of JSON."""
    from data.cli import parse_cli  # its package is not needed to plan from Python

    args = parse_cli(Args, argv)
    try:
        values = report(args)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"{format_report(values)}\n{json.dumps(values)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
