"""How fast a long prompt is read with a share of the experts on the GPU, and what memory it takes.

    python -m benchmarks.prefill                              # gpt-oss-20b's shape, 25 % resident
    python -m benchmarks.prefill chunk_tokens=1024,4096 staging=4,8
    TRITON_INTERPRET=1 python -m benchmarks.prefill small=true repeats=1      # on a CPU

A real model's code at real size with random weights (`benchmarks.replay_testbed.build_model`),
served by the runtime's own backend; all layers' experts are copies of one random block, each in its
own pinned memory. Routing is what random weights choose: thousands of tokens need every expert of a
layer anyway. One pass fills the slots and is not timed.

    efficiency = max(resident pass, bytes over the link / measured link rate) / measured pass

A row is compute-bound where its fully resident pass takes longer than its bytes. Peak memory is
what was allocated, against the plan of `runtime.gpu_memory` for the same slots. Ends with one line
of JSON; ``out=benchmarks/results/prefill.json`` keeps it.
"""

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.decode import DTYPES, check_names
from benchmarks.options import as_json, parse_options
from benchmarks.record import record, spread
from benchmarks.replay_shapes import SHAPES
from benchmarks.replay_testbed import build_model, filled_store, use_experts
from data.adapters import moe_layers, spec_of
from data.machine import hardware
from runtime.budget import slots_at
from runtime.expert_layout import ExpertLayout
from runtime.footprint import footprint, skeleton
from runtime.gpu_experts import GpuExperts
from runtime.gpu_memory import plan_memory
from runtime.link import measure_link
from runtime.policies import make_policy

_IMPLEMENTATION = "benchmark-prefill"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        shape: One of `SHAPES`.
        residencies: Shares of the experts that have a slot; 1 is measured in any case.
        tokens: Length of the prompt.
        chunk_tokens: How much of it is computed at once; a row for each.
        staging: Staging buffers; a row for each.
        policy: Of the cache.
        repeats: How often each row is timed.
        small: 2 layers of 8 small experts and a prompt of 96 tokens, for a CPU.
        device: auto, cpu or cuda.
        dtype: Of all weights.
        out: Keep the JSON here; "" does not.
    """

    shape: str = "gptoss20b"
    residencies: tuple[float, ...] = (0.25,)
    tokens: int = 4096
    chunk_tokens: tuple[int, ...] = (4096,)
    staging: tuple[int, ...] = (4,)
    policy: str = "lru"
    repeats: int = 5
    small: bool = False
    device: str = "auto"
    dtype: str = "bfloat16"
    out: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        check_names(shape=self.shape, dtype=self.dtype)
        for name in ("repeats", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not all(0 < share <= 1 for share in self.residencies):
            raise ValueError(f"residencies={self.residencies}: must be shares in (0, 1]")
        for name in ("chunk_tokens", "staging"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive numbers")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reading of the prompt.

    Attributes:
        spent_s: Seconds from first token in to last logits out.
        link_bytes: That crossed the link.
        wasted_bytes: Those of them that nobody needed.
        misses: Experts that a layer needed and did not have.
        logits_V: Of the prompt's last token.
    """

    spent_s: float
    link_bytes: int
    wasted_bytes: int
    misses: int
    logits_V: Tensor


class Bed:
    """The model and its experts in host memory.

    Args:
        options: What is measured.
    """

    def __init__(self, options: Options) -> None:
        gpu = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
        self.device = torch.device("cpu")
        if gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.shape = SHAPES[options.shape]
        self.shape = self.shape.small() if options.small else self.shape
        self.dtype = DTYPES[options.dtype]
        torch.manual_seed(0)
        self.model = build_model(self.shape, self.device, self.dtype)
        self.layers = moe_layers(self.model)
        self.spec = spec_of(self.model, model_id=self.shape.family)
        self.layout = ExpertLayout.of(self.layers[0].experts)
        block_EP = torch.empty(
            self.spec.num_experts, self.layout.record_elements, dtype=self.dtype, device=self.device
        ).normal_(std=self.layout.hidden_size**-0.5)
        self.store = filled_store(self.layout, self.spec.num_layers, block_EP)
        tokens = 96 if options.small else options.tokens
        self.ids_BT = torch.randint(
            self.shape.config["vocab_size"], (1, tokens), device=self.device
        )
        self.kv = StaticCache(config=self.model.config, max_cache_len=tokens)

    @torch.no_grad()
    def read(self, backend: GpuExperts, chunk_tokens: int) -> Pass:
        """Read the prompt once, in chunks, the KV cache carried on."""
        self.kv.reset()
        stats = backend.prefill_stats
        before = (stats.link_bytes, stats.wasted_bytes, backend.stats().misses)
        self._wait()
        started_s = time.perf_counter()
        for chunk_BT in torch.split(self.ids_BT, chunk_tokens, dim=1):
            output = self.model(
                input_ids=chunk_BT, past_key_values=self.kv, use_cache=True, logits_to_keep=1
            )
        self._wait()
        return Pass(
            spent_s=time.perf_counter() - started_s,
            link_bytes=stats.link_bytes - before[0],
            wasted_bytes=stats.wasted_bytes - before[1],
            misses=backend.stats().misses - before[2],
            logits_V=output.logits[0, -1].float().cpu(),
        )

    @contextmanager
    def served_by(self, backend: GpuExperts) -> Iterator[None]:
        """Let ``backend`` compute the model's experts."""
        layer_of = {moe.experts: moe.layer for moe in self.layers}

        def forward(experts: nn.Module, *arguments: Tensor) -> Tensor:
            return backend.forward(layer_of[experts], *arguments)

        ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = forward
        use_experts(self.layers, _IMPLEMENTATION)
        try:
            yield
        finally:
            ALL_EXPERTS_FUNCTIONS.pop(_IMPLEMENTATION)

    def planned_bytes(self, *, slots: int, chunk_tokens: int, staging: int) -> int:
        """What `attach` would plan for everything on the GPU."""
        likeness = skeleton(
            AutoConfig.for_model(self.shape.family, **self.shape.config), self.dtype
        )
        counted = footprint(
            likeness, context=self.ids_BT.shape[1], batch=1, chunk_tokens=chunk_tokens
        )
        return plan_memory(counted, None, slots=slots, staging_buffers=staging).total_bytes

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(options: Options) -> dict[str, Any]:
    """All rows: fully resident ones first, for every chunk length."""
    bed = Bed(options)
    link = measure_link(bed.device)
    rows: list[dict[str, Any]] = []
    for chunk_tokens in options.chunk_tokens:
        shares = [1.0, *(share for share in options.residencies if share < 1)]
        resident: dict[str, Any] = {}
        for share in shares:
            for staging in options.staging if share < 1 else options.staging[:1]:
                row = _row(bed, options, slots_at(share, bed.spec), chunk_tokens, staging)
                resident = resident or row
                logits_V = row.pop("logits_V")
                first_V = resident.setdefault("first_V", logits_V)
                row["exact"] = bool(torch.equal(logits_V, first_V))
                row["finite"] = bool(logits_V.isfinite().all())
                compute_s = resident["pass_s"]["median"]
                if link is not None:
                    link_s = row["link_bytes"] / link.engine.bytes_per_s
                    row["bound"] = "compute" if compute_s >= link_s else "link"
                    row["efficiency"] = max(compute_s, link_s) / row["pass_s"]["median"]
                rows.append(row)
                print(_line(row), flush=True)
        resident.pop("first_V")
    bed.store.close()
    return {
        "model": bed.spec.describe(),
        "options": as_json(options),
        "device": hardware()["gpus"] if bed.device.type == "cuda" else "cpu",
        "record_bytes": bed.layout.record_bytes,
        "is_pinned": bed.store.is_pinned,
        "link_bytes_per_s": None if link is None else link.engine.bytes_per_s,
        "rows": rows,
    }


def _row(bed: Bed, options: Options, slots: int, chunk_tokens: int, staging: int) -> dict[str, Any]:
    """Time one way of reading the prompt."""
    on_gpu = bed.device.type == "cuda"
    backend = GpuExperts(
        layers=bed.layers,
        spec=bed.spec,
        slots=(slots,) * bed.spec.num_layers,
        policy=make_policy(options.policy),
        store=bed.store,
        staging_buffers=staging,
    )
    with bed.served_by(backend):
        bed.read(backend, chunk_tokens)  # fills the slots, the KV cache and torch's own workspaces
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(bed.device)
        passes = [bed.read(backend, chunk_tokens) for _ in range(options.repeats)]
        peak_bytes = torch.cuda.max_memory_allocated(bed.device) if on_gpu else None
    del backend
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    planned = bed.planned_bytes(slots=slots, chunk_tokens=chunk_tokens, staging=staging)
    assert all(torch.equal(one.logits_V, passes[0].logits_V) for one in passes)
    return {
        "residency": slots / bed.spec.num_experts,
        "slots": slots,
        "chunk_tokens": chunk_tokens,
        "staging": staging,
        "pass_s": spread([one.spent_s for one in passes]),
        "link_bytes": passes[-1].link_bytes,
        "wasted_bytes": passes[-1].wasted_bytes,
        "misses": passes[-1].misses,
        "achieved_bytes_per_s": spread([one.link_bytes / one.spent_s for one in passes]),
        "tokens_per_s": spread([bed.ids_BT.shape[1] / one.spent_s for one in passes]),
        "peak_bytes": peak_bytes,
        "planned_bytes": planned,
        "peak_over_plan": None if peak_bytes is None else peak_bytes / planned,
        "logits_V": passes[-1].logits_V,
    }


def _line(row: dict[str, Any]) -> str:
    """One row for people."""
    said = (
        f"{100 * row['residency']:.0f} % resident, chunks of {row['chunk_tokens']}, "
        f"{row['staging']} buffers: {1e3 * row['pass_s']['median']:.1f} ms, "
        f"{row['link_bytes'] / 1e9:.2f} GB at {row['achieved_bytes_per_s']['median'] / 1e9:.1f} "
        f"GB/s, exact {row['exact']}"
    )
    if "efficiency" in row:
        said += f", {row['bound']}-bound, efficiency {row['efficiency']:.3f}"
    if row["peak_over_plan"] is not None:
        said += f", peak {row['peak_bytes'] / 2**30:.2f} GiB = {row['peak_over_plan']:.3f} of plan"
    return said


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, arguments)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    result = measure(options)
    record("prefill", result, out=Path(options.out) if options.out else None)


if __name__ == "__main__":
    main(sys.argv[1:])
