"""Replays recorded routing through the real cache: what would each policy hit at each budget?

    python -m runtime.simulate trace=gptoss20b policy=[lru,lfru] slots=[8,13,16] max_tokens=30000
    python -m runtime.simulate trace=qwen policy=lru budget_bytes=4194304000 scope=global
    python -m runtime.simulate trace=mine.npz policy=[lfru,forecast] slots=8 artifact=DIR

It steps the same `ExpertCache` with the same policies as the runtime, all layers, policies and
budgets at once, and counts bytes in place of moving them. It ends with one line of JSON.

The cache persists across requests, in the order of the traces; LFRU and Belady always run along,
since `gap_closed` is measured between them. `EventList.of` says what an event is, `Counters` what
an access and a hit are.

Shape letters: L MoE layers · E experts per layer · P policies · B budgets.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor
from tqdm import tqdm

from data.cli import parse_cli
from data.errors import MoecastError
from data.importers import load_traces
from data.schema import MoESpec, Trace, TraceSet
from predictors.base import Predictor, Walked
from predictors.request_history import RequestHistory
from runtime.budget import Budget, Scope, parse_budgets, working_set_bytes
from runtime.cache import Event, ExpertCache
from runtime.metrics import Clock, Counters, gap_closed, ratio
from runtime.policies import make_policy
from runtime.policies.base import Policy
from runtime.replay import EventList, Prefill, ReplayEvent
from runtime.variants import Foresights, SideBySide

_BASELINES = ("lfru", "belady")  # 0 and 1 of gap_closed


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One policy at one budget.

    Args:
        policy: Its name.
        scope: "layer", a cache of `slots` in every layer; "global", one pool for all layers.
        prefill: "union" or "per_token": how prompts were replayed.
        slots: Per layer; None for a pool that was given in bytes.
        budget_bytes: Of all slots; None where the trace does not say how large an expert is.
        hits, accesses: `Counters` has the definitions; prompts included.
        hit_ratio: hits / accesses.
        decode_hits, decode_accesses, decode_hit_ratio: Without prompts; None without decode.
        hit_ratio_per_layer: Prompts included.
        evictions, streamed: Counts.
        miss_bytes: Bytes that crossed the link; None where sizes are unknown.
        gap_closed: (hits - LFRU's) / (Belady's - LFRU's) at this budget; None without a gap.
        belady_misses: At this budget.
        lru_floor_bytes: One token's working set: below it a global LRU hits next to nothing.
        bound_s, serial_s: Seconds per decoded token by `Clock`, if one was given.
    """

    policy: str
    scope: Scope
    prefill: Prefill
    slots: int | None
    budget_bytes: int | None
    hits: int
    accesses: int
    hit_ratio: float
    decode_hits: int
    decode_accesses: int
    decode_hit_ratio: float | None
    hit_ratio_per_layer: list[float] = field(repr=False)
    evictions: int
    streamed: int
    miss_bytes: int | None
    gap_closed: float | None
    belady_misses: int
    lru_floor_bytes: int | None
    bound_s: float | None
    serial_s: float | None


class Walker(Protocol):
    """What a replay asks of a predictor."""

    def walk(self, trace: Trace, *, with_truth: bool = False) -> Walked:
        """As `Predictor.walk`."""
        ...

    def with_history(self, history: RequestHistory) -> "Walker":
        """As `Predictor.with_history`."""
        ...


@torch.inference_mode()  # a seventh faster on tensors this small
def simulate(
    traces: TraceSet,
    *,
    policies: Sequence[str | Policy],
    slots: Sequence[int] = (),
    budget_bytes: Sequence[int] = (),
    scope: Scope = "layer",
    predictor: Walker | None = None,
    with_truth: bool = False,
    prefill: Prefill = "auto",
    max_tokens: int | None = None,
    clock: Clock | None = None,
    baseline_hits: Mapping[str, Sequence[int]] | None = None,
    progress: bool = True,
) -> list[Result]:
    """Replay ``traces`` under every policy at every budget.

    Args:
        traces: The requests, in the order of arrival.
        policies: Names, or policies themselves; one name stands for one result a budget.
        slots: Budgets in slots per layer; a global pool gets the bytes of as many slots per layer.
        budget_bytes: Budgets in bytes of all layers together, instead of slots; scope "layer" cuts
            them into equal numbers of slots.
        scope: One cache a layer, or one pool in which a layer may evict another's experts.
        predictor: A fitted predictor, for policies that need a forecast; it is walked over each
            trace once, strictly causally. A forecast stands until the next, 0 before the first.
        with_truth: Let the predictor see each request's future: for the oracle only.
        prefill: `EventList.of` has the choices.
        max_tokens: Replay only so many routed tokens.
        clock: Rates for `Result.bound_s` and `Result.serial_s`; needs expert sizes.
        baseline_hits: Hits of LFRU and of Belady at each budget, from an earlier replay of the same
            traces with the same arguments; those that are not given run along.
        progress: Show a bar (where stderr is a terminal).

    Returns:
        Policies in the order given; within each, budgets in the order given.

    Raises:
        ValueError: An argument is out of range, or two contradict each other.
    """
    asked = [make_policy(p) if isinstance(p, str) else p for p in dict.fromkeys(policies)]
    if not asked:
        raise ValueError("policies: give at least one")
    running = [*asked]
    names = [policy.name for policy in asked]
    known = dict(baseline_hits or {})
    running += [make_policy(name) for name in _BASELINES if name not in [*names, *known]]
    names = [policy.name for policy in running]
    spec = traces.spec
    budgets = parse_budgets(spec, slots=slots, budget_bytes=budget_bytes, scope=scope)
    if clock is not None and spec.expert_bytes_per_layer is None:
        raise ValueError(f"a clock needs the experts' sizes; {spec.describe()} does not say them")
    events = EventList.of(traces, prefill=prefill, max_tokens=max_tokens)
    variants = (len(running), len(budgets))
    walker = None if predictor is None else _walker(predictor, traces, with_truth=with_truth)
    foresight = Foresights(spec, running, walker)
    cache = _build_cache(spec, SideBySide(running), budgets, scope, variants)
    prompt = Counters(spec.num_layers, variants=variants)
    decode = Counters(spec.num_layers, variants=variants)
    serve = _serve_layers if scope == "layer" else _serve_pool
    with tqdm(total=events.num_tokens, unit="token", disable=None if progress else True) as bar:
        for event in events:
            serve(cache, event, foresight, prompt if event.is_prompt else decode)
            bar.update(event.index_NLK.shape[0])
    hits_PB = (prompt.hits_L + decode.hits_L).sum(-1)
    known |= {name: hits_PB[p].tolist() for p, name in enumerate(names) if name in _BASELINES}
    if missing := [name for name, hits_B in known.items() if len(hits_B) != len(budgets)]:
        raise ValueError(f"baseline_hits of {missing}: must be {len(budgets)}, one for each budget")
    return [
        _result(names, (p, b), budget, scope, events, prompt, decode, known, clock)
        for p in range(len(asked))
        for b, budget in enumerate(budgets)
    ]


def replay_log(
    traces: TraceSet,
    *,
    policy: str | Policy,
    slots: int | Tensor,
    predictor: Predictor | None = None,
    prefill: Prefill = "union",
) -> list[Event]:
    """The event log of one cache per layer that serves ``traces``: what a runtime must equal.

    ``slots`` may be a tensor [L]. Layers of an event follow one another, as in a forward pass.
    """
    chosen = make_policy(policy) if isinstance(policy, str) else policy
    spec = traces.spec
    cache = ExpertCache(
        chosen,
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        slots=slots,
        record_events=True,
    )
    walker = None if predictor is None else _walker(predictor, traces, with_truth=False)
    foresight = Foresights(spec, [chosen], walker)
    for event in EventList.of(traces, prefill=prefill):
        foresight.begin(event)
        foresight.route(event)
        cache.step(event.needed_LE, forecast_LE=foresight.scores_PLE[0])
    return cache.events


def _build_cache(
    spec: MoESpec,
    policy: Policy,
    budgets: Sequence[Budget],
    scope: Scope,
    variants: tuple[int, int],
) -> ExpertCache:
    """Variants [P, B]; the pool is a single layer of all experts."""
    if scope == "layer":
        slots_B1 = torch.tensor([[budget.slots] for budget in budgets])
        return ExpertCache(
            policy,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            slots=slots_B1,
            variants=variants,
            with_slots=False,
        )
    num_experts = spec.num_layers * spec.num_experts
    sizes = spec.expert_bytes_per_layer
    if sizes is None:
        slots_B1 = torch.tensor([[(budget.slots or 0) * spec.num_layers] for budget in budgets])
        return ExpertCache(
            policy,
            num_layers=1,
            num_experts=num_experts,
            slots=slots_B1,
            variants=variants,
            with_slots=False,
        )
    return ExpertCache(
        policy,
        num_layers=1,
        num_experts=num_experts,
        budget_bytes=torch.tensor([[budget.budget_bytes] for budget in budgets]),
        expert_bytes_LE=torch.tensor(sizes).repeat_interleave(spec.num_experts)[None],
        variants=variants,
        with_slots=False,
    )


def _serve_layers(
    cache: ExpertCache, event: ReplayEvent, foresight: Foresights, counters: Counters
) -> None:
    foresight.begin(event)
    foresight.route(event)
    step = cache.step(
        event.needed_LE, forecast_LE=foresight.scores_PLE, max_needed=event.max_needed
    )
    counters.add(step)


def _serve_pool(
    cache: ExpertCache, event: ReplayEvent, foresight: Foresights, counters: Counters
) -> None:
    foresight.begin(event)
    num_layers, num_experts = event.needed_LE.shape
    # Row l of [L, L*E] needs layer l's experts of the pool.
    needed_LJ = torch.zeros(num_layers, num_layers, num_experts, dtype=torch.bool)
    needed_LJ.diagonal().copy_(event.needed_LE.T)
    for layer, needed_J in enumerate(needed_LJ.flatten(1).unbind(0)):
        foresight.route(event, layer)
        step = cache.step(
            needed_J,
            layer=0,
            forecast_LE=foresight.scores_PLE.flatten(1),
            max_needed=event.max_needed,
        )
        counters.add(step, layer)


def _walker(predictor: Walker, traces: TraceSet, *, with_truth: bool) -> Callable[[int], Walked]:
    history = RequestHistory()
    following = predictor.with_history(history)

    def walked(index: int) -> Walked:
        trace = traces[index]
        # What a predictor keeps for itself must not become an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            said = following.walk(trace, with_truth=with_truth)
            # Requests are replayed one after the other: the next call is for a later one.
            history.add_trace(trace, traces.spec.num_experts)
        return said

    return walked


def _result(
    names: Sequence[str],
    variant: tuple[int, int],
    budget: Budget,
    scope: Scope,
    events: EventList,
    prompt: Counters,
    decode: Counters,
    known: Mapping[str, Sequence[int]],
    clock: Clock | None,
) -> Result:
    p, b = variant
    spec = events.spec
    hits_L = prompt.hits_L + decode.hits_L  # [P, B, L]
    accesses_L = prompt.accesses_L + decode.accesses_L
    hits, accesses = int(hits_L[p, b].sum()), int(accesses_L[p, b].sum())
    decode_hits, decode_accesses = (
        int(counts_L[p, b].sum()) for counts_L in (decode.hits_L, decode.accesses_L)
    )
    lfru_hits, belady_hits = (known[name][b] for name in _BASELINES)
    miss_bytes = bound_s = serial_s = floor_bytes = None
    if spec.expert_bytes_per_layer is not None:
        bytes_L = torch.tensor(spec.expert_bytes_per_layer)
        miss_bytes = int(((accesses_L - hits_L)[p, b] * bytes_L).sum())
        floor_bytes = working_set_bytes(spec)
        num_decoded = int((~events.is_prompt).sum())
        if clock is not None and num_decoded:
            load = {
                "layer_calls": num_decoded * spec.num_layers,
                "misses": decode_accesses - decode_hits,
                "miss_bytes": int((decode.misses_L[p, b] * bytes_L).sum()),
            }
            bound_s = clock.bound_s(**load) / num_decoded
            serial_s = clock.serial_s(**load) / num_decoded
    return Result(
        policy=names[p],
        scope=scope,
        prefill=events.prefill,
        slots=budget.slots,
        budget_bytes=budget.budget_bytes,
        hits=hits,
        accesses=accesses,
        hit_ratio=hits / accesses,
        decode_hits=decode_hits,
        decode_accesses=decode_accesses,
        decode_hit_ratio=ratio(decode_hits, decode_accesses),
        hit_ratio_per_layer=(hits_L[p, b] / accesses_L[p, b]).tolist(),
        evictions=int((prompt.evictions_L + decode.evictions_L)[p, b].sum()),
        streamed=int((prompt.streamed_L + decode.streamed_L)[p, b].sum()),
        miss_bytes=miss_bytes,
        gap_closed=gap_closed(hits, lfru_hits=lfru_hits, belady_hits=belady_hits),
        belady_misses=accesses - belady_hits,
        lru_floor_bytes=floor_bytes,
        bound_s=bound_s,
        serial_s=serial_s,
    )


@dataclass
class Args:
    """Replay recorded routing under cache policies and print what each one hits.

    trace: a name or path of any traces; policy and the budgets may be lists: slots=[8,13,16].
    artifact: the folder of a predictor, for policy=forecast. Every request of the trace is
    replayed, also those it may have been fitted on: predictors.evaluate leaves those out.
    """

    trace: str
    policy: list[str]
    slots: list[int] = field(default_factory=list)
    budget_bytes: list[int] = field(default_factory=list)
    artifact: Path | None = None
    scope: str = "layer"
    prefill: str = "auto"
    max_tokens: int | None = None
    link_bytes_per_s: float | None = None
    compute_s_per_layer: float = 0.0


def main(argv: Sequence[str]) -> None:
    """Command line: a table for people, then one line of JSON."""
    # Artifacts take FAISS and pydantic; whoever replays a fitted predictor does without.
    from predictors.artifact import load_artifact, read_manifest

    args = parse_cli(Args, argv)
    try:
        # A trace that does not say how many experts there are is taken for the artifact's model's.
        told = None if args.artifact is None else read_manifest(args.artifact).spec.num_experts
        traces = load_traces(args.trace, num_experts=told)
        clock = None
        if args.link_bytes_per_s is not None:
            clock = Clock(
                link_bytes_per_s=args.link_bytes_per_s,
                compute_s_per_layer=args.compute_s_per_layer,
            )
        results = simulate(
            traces,
            policies=args.policy,
            slots=args.slots,
            budget_bytes=args.budget_bytes,
            predictor=None
            if args.artifact is None
            else load_artifact(args.artifact, expect=traces.spec),
            scope=cast(Scope, args.scope),
            prefill=cast(Prefill, args.prefill),
            max_tokens=args.max_tokens,
            clock=clock,
        )
    except (MoecastError, ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"{traces.spec.describe()}\n{_format_table(results)}\n")
    report = {
        "trace": args.trace,
        "digest": traces.digest,
        "model": traces.spec.model_id,
        "results": [dataclasses.asdict(result) for result in results],
    }
    sys.stdout.write(json.dumps(report) + "\n")


def _format_table(results: Sequence[Result]) -> str:
    def cell(value: float | None, scale: float, decimals: int) -> str:
        return "-" if value is None else f"{value * scale:.{decimals}f}"

    columns = {
        "policy": [r.policy for r in results],
        "slots": [cell(r.slots, 1, 0) for r in results],
        "GiB": [cell(r.budget_bytes, 2**-30, 2) for r in results],
        "hit %": [cell(r.hit_ratio, 100, 2) for r in results],
        "decode %": [cell(r.decode_hit_ratio, 100, 2) for r in results],
        "missed GB": [cell(r.miss_bytes, 1e-9, 1) for r in results],
        "gap closed %": [cell(r.gap_closed, 100, 1) for r in results],
    }
    if any(r.serial_s is not None for r in results):
        columns["bound ms"] = [cell(r.bound_s, 1e3, 2) for r in results]
        columns["serial ms"] = [cell(r.serial_s, 1e3, 2) for r in results]
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    lines = ["  ".join(name.rjust(width) for name, width in widths.items())]
    for row in zip(*columns.values(), strict=True):
        cells = zip(row, widths.values(), strict=True)
        lines.append("  ".join(text.rjust(width) for text, width in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
