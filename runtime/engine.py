"""Serving a model with only some of its experts in memory, token for token as if all were.

`attach` moves a loaded model's routed experts to a slower tier (a store on disk, or on a GPU pinned
host memory), gives some of the memory back to slots, and registers one function in transformers'
``ALL_EXPERTS_FUNCTIONS``: no model is forked, so every family that routes through that interface
works. Each call of that function is one event of the cache: every expert that these tokens need in
this layer is found, loaded or read in place. `Offload.detach` puts everything back, to the bit.

The engine only connects: what to keep is decided by the cache and its policy (the same objects as
in the simulator), bytes are moved and experts computed by a `Backend`, forecasts come from a
`ServedPredictor` (through an `Observer` on a CPU; on a GPU within captured steps, or on a thread of
the host), which can be swapped. One forward pass at a time; no gradient flows through it.

Shape letters: T tokens · E experts per layer · K experts per token · D hidden · C slots.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data.adapters import moe_layers, spec_of
from predictors.base import Predictor
from runtime.attach_checks import (
    check_foresight,
    check_gpu_options,
    check_mode,
    check_model,
    check_spec,
    check_split,
    slots_per_layer,
)
from runtime.backend import Backend, CpuBackend
from runtime.compiled_layers import CompiledLayers
from runtime.gpu_memory import context_of
from runtime.graph_forecasts import device_bytes
from runtime.offload import Offload
from runtime.policies import make_policy
from runtime.policies.base import Policy
from runtime.prefetch.options import PrefetchOptions
from runtime.prefetch.served import Prefetch, prefetch_bytes, source_for
from runtime.redivide import MeasuredSplit, Redivider
from runtime.sizes import parse_bytes
from runtime.slot_split import SlotSplit

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    *,
    policy: str | Policy = "lru",
    slots: int | Sequence[int] | None = None,
    budget_bytes: int | str | None = None,
    split: SlotSplit | MeasuredSplit | None = None,
    predictor: Predictor | None = None,
    device: torch.device | str | None = None,
    store_dir: Path | str | None = None,
    record_events: bool = False,
    compile_layers: bool = False,
    cpu_lane: bool | Literal["auto"] = False,
    prefetch: Prefetch = False,
    trial_tokens: int | None = None,
    context_tokens: int | None = None,
    mode: Literal["lossless", "resident_only"] = "lossless",
    resident_scores_LE: Tensor | None = None,
) -> Offload:
    """Serve ``model`` with only some of its experts in memory; its outputs stay the same.

    On a CPU the experts are first written to a store (unless ``store_dir`` holds it already); until
    that is complete the model is untouched, and no second copy of them is held in memory.

    On a GPU they move to pinned host memory, layer by layer, and everything else of the model to
    the GPU; ``model.generate`` reads prompts in chunks, which is what memory is planned for, and
    its decode steps are captured in a graph (`runtime.decode_graph`). What fails half-way is
    undone.

    Args:
        model: A transformers model in float32, bfloat16 or float16, all of it on one device.
        policy: What to keep: a name of `runtime.policies.POLICIES`, or a policy.
        slots: Resident experts per MoE layer: one number, or one per layer.
        budget_bytes: Instead of ``slots``: memory such as "12GiB". On a CPU that of all slots; on a
            GPU that of everything: other weights, KV cache, activations, workspace, what a
            predictor takes there, and slots.
        split: Only for a GPU: keep the tops of experts, some neurons of each, in slots that may
            differ from layer to layer. Outputs are the same bits. A `runtime.slot_split.SlotSplit`
            stands instead of ``slots``, and is refused if ``budget_bytes`` does not hold it; by a
            `runtime.redivide.MeasuredSplit` the memory that they give is divided by measurements,
            anew whenever it is due and nobody is served.
        predictor: A fitted predictor for this model; what policies that read forecasts read. On a
            GPU it runs inside the graph if it can (`Predictor.graph_module`), or else on a thread
            that no forward pass waits for. If it fails it is switched off, and policy "lfru" goes
            on; `OffloadStats` says so.
        device: Where to serve; by default where the model is. "cuda" takes a model that is on the
            CPU to the GPU until `Offload.detach`.
        store_dir: Where stores live, to be found again by the next run. By default a temporary
            folder, removed by `Offload.detach`. It takes the experts' size, so let it be on a disk.
            Only for the CPU.
        record_events: Keep the cache's log of every hit, miss, eviction and streamed read. Only for
            the CPU: reading it would make every step of a GPU wait for the host.
        compile_layers: Compile what lies between the experts for decoding (`CompiledLayers`): a
            quarter less time a token where all experts are resident, for some seconds before the
            first one. Logits differ from the model's by rounding. Only for a GPU.
        cpu_lane: On a GPU, let processor cores compute a part of what a decode step misses while
            the link carries the rest; they spin while decoding. "auto" takes it where it wins.
            Outputs are then exact to rounding, but no longer the same bits at every residency.
        prefetch: On a GPU, bring what the predictor expects of the next layers into a small buffer
            while the link would be idle. "auto" does where it can: the policy reads forecasts, and
            the predictor runs inside the graph. It is switched off, with a line in the log, in
            layers where it loses, and altogether where it does not pay (`OffloadStats` says so).
        trial_tokens: Only for a GPU: serve a prompt of so many tokens, beside a KV cache of the
            whole context, before anything else, so that what does not fit fails now; 0 = do not. By
            default one chunk where ``budget_bytes`` is given: no prompt takes more memory.
        context_tokens: Only for a GPU: prompt and answer of the one sequence whose KV cache
            ``budget_bytes`` shall hold; by default `runtime.gpu_memory.CONTEXT_TOKENS`, or what the
            model has. A server must not admit longer ones (`Offload.context_tokens`).
        mode: "resident_only" is LOSSY: tokens are routed to the best experts that are resident, and
            nothing is loaded but by `Offload.keep_resident` (`runtime.resident_routing`). Only for
            the CPU; the policy then has nothing to decide.
        resident_scores_LE: For that mode, who is resident at first; see `Offload.keep_resident`.

    Raises:
        NotAMoEError: The model is dense, or its family bypasses transformers' ExpertsInterface.
        SpecMismatchError: The predictor was fitted for another model.
        ValueError: Slots, budget, policy or device cannot work, or the model is attached already.
    """
    layers = moe_layers(model)
    spec = spec_of(model)
    target = check_model(model, layers, device)
    policy = make_policy(policy) if isinstance(policy, str) else policy
    check_foresight(policy, predictor)
    if predictor is not None:
        check_spec(predictor, spec)
    check_mode(mode, device=target, spec=spec, predictor=predictor, scores_LE=resident_scores_LE)
    source = source_for(prefetch, policy, predictor, spec, target)
    if split is not None:
        check_split(split, device=target, slots=slots)
        if source is not None and cpu_lane:
            raise ValueError(
                f"split with prefetch={prefetch!r} and cpu_lane={cpu_lane!r}: processor cores "
                "would compute what has been fetched; leave one of them out"
            )
    generates = getattr(model, "generation_config", None) is not None
    if target.type == "cpu":
        if compile_layers:
            raise ValueError("compile_layers=True: only for a GPU, leave it out on a CPU")
        if cpu_lane is True:
            raise ValueError("cpu_lane=True: experts are served by the CPU anyway; leave it out")
        if trial_tokens:
            raise ValueError(f"trial_tokens={trial_tokens}: prompts are tried on a GPU only")
        if context_tokens is not None:
            raise ValueError(f"context_tokens={context_tokens}: memory is planned on a GPU only")
        num_slots = slots_per_layer(spec, slots, budget_bytes)
        if predictor is not None:
            predictor.bind(model)
        backend: Backend = CpuBackend.build(
            layers=layers,
            spec=spec,
            slots=num_slots,
            policy=policy,
            store_dir=store_dir,
            record_events=record_events,
        )
        planned_bytes = prefetcher = fetches = None
    else:
        check_gpu_options(target, store_dir=store_dir, record_events=record_events)
        from runtime.gpu_experts import GpuExperts  # its kernels need triton
        from runtime.gpu_memory import CHUNK_TOKENS, allocated_bytes, gpu_slots_for_bytes

        planned_bytes = None
        cut = split if isinstance(split, SlotSplit) else None
        if context_tokens is not None or (budget_bytes is not None and slots is None):
            context_tokens = context_of(model, context_tokens)
        if budget_bytes is not None and slots is None:
            assert context_tokens is not None
            budget = parse_bytes(budget_bytes)
            forecast_bytes = 0
            if predictor is not None and policy.foresight == "forecast":
                forecast_bytes = device_bytes(predictor)
            slots = gpu_slots_for_bytes(
                model,
                layers,
                spec,
                budget,
                device=target,
                predictor_bytes=forecast_bytes,
                prefetch_bytes=0 if source is None else prefetch_bytes(layers, predictor),
                context_tokens=context_tokens,
                split=cut,
            )
            planned_bytes = budget - forecast_bytes + allocated_bytes(model, target)
            if trial_tokens is None:
                trial_tokens = min(CHUNK_TOKENS, context_tokens - 1)
            budget_bytes = None
        num_slots = cut.slots if cut else slots_per_layer(spec, slots, budget_bytes)
        backend = experts = GpuExperts.build(
            model=model,
            layers=layers,
            spec=spec,
            slots=cut or num_slots,
            policy=policy,
            device=target,
            cpu_lane=cpu_lane,
            prefetch_by=source,
            prefetch=None if split is None else PrefetchOptions(into="beside"),
            count_routing=isinstance(split, MeasuredSplit),
        )
        prefetcher, fetches = experts.prefetcher, experts.fetches
        if source is not None and fetches is None:
            logger.warning(
                "Nothing is prefetched: every expert has a slot, or none could be page-locked"
            )
    offload = Offload(
        layers=layers,
        spec=spec,
        slots=num_slots,
        backend=backend,
        context_tokens=context_tokens,
        prefetch_by=source if fetches is not None else None,
    )
    if prefetcher is not None:
        prefetcher.review.on_change = offload._capture_anew
    try:
        offload._install()
        if resident_scores_LE is not None:
            offload._restrict(layers, resident_scores_LE)
        if target.type == "cuda" and generates:
            offload._cut_prompts(model, CHUNK_TOKENS)
        if backend.max_graph_tokens is not None and generates:
            compiled = CompiledLayers(model) if compile_layers else None
            offload._capture_decoding(model, max_batch=backend.max_graph_tokens, compiled=compiled)
        if trial_tokens and generates:
            offload._try_prompt(model, trial_tokens, planned_bytes)
        if isinstance(split, MeasuredSplit):
            assert isinstance(backend, GpuExperts)
            offload._divide_when_idle(Redivider(backend, split, model))
        if predictor is not None and target.type == "cuda":
            predictor.bind(model)  # now that it is where it runs
        if predictor is not None and policy.foresight == "forecast":
            offload._observe(model, layers, predictor)
    except BaseException:
        offload.detach()
        raise
    logger.info(
        "Attached %s on %s: %s slots per layer, %s",
        spec.describe(),
        target,
        sorted(set(num_slots)),
        f"policy {policy.name}" if mode == "lossless" else f"mode {mode} (LOSSY)",
    )
    return offload
