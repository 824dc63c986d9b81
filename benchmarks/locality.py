"""What a trace offers to a cache, whichever its policy: recency, popularity, and the request.

`locality` measures them; `shuffled` takes recency away and leaves the rest. Both look at the first
``max_tokens`` tokens of the requests in their order, as a replay does. Knows no cache.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token · C kept experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data.schema import Trace, TraceList
from predictors.routing import expert_use_TLE


def shuffled(traces: TraceList, seed: int, *, across: bool, max_tokens: int) -> TraceList:
    """The first tokens in random order: each request's own, or (`across`) of all of them mixed."""
    rng, cut, num_left = np.random.default_rng(seed), [], max_tokens
    for trace in traces.traces:
        cut.append(trace.topk_expert_ids_TLK[: min(num_left, trace.num_tokens)])
        num_left -= len(cut[-1])
        if num_left == 0:
            break
    lengths = [len(ids_TLK) for ids_TLK in cut]
    if across:
        rows_TLK = rng.permutation(np.concatenate(cut))
        cut = np.split(rows_TLK, np.cumsum(lengths)[:-1])
    else:
        cut = [rng.permutation(ids_TLK) for ids_TLK in cut]
    return replace(
        traces,
        traces=[
            Trace(
                request_id=trace.request_id,
                source=trace.source,
                topic=trace.topic,
                topk_expert_ids_TLK=ids_TLK,
                num_prompt_tokens=0,
                first_routed_position=0,
            )
            for trace, ids_TLK in zip(traces.traces, cut, strict=False)
        ],
    )


def locality(traces: TraceList, slots: Sequence[int], *, max_tokens: int) -> dict[str, Any]:
    """What a trace offers to recency, to popularity, and to knowing the request.

    Returns:
        `overlap`: share of a token's experts that the token before used; `overlap_by_chance`: what
        it would be if tokens of the same popularities were independent; `reused_within`: share of
        uses whose expert was used at most so many tokens before, in the same request; `fixed_hit`:
        hit ratio of a cache that never changes, filled with the most popular experts of all
        requests or of each request, chosen on even tokens and judged on odd ones.
    """
    num_experts, top_k = traces.spec.num_experts, traces.spec.top_k
    uses, num_left = [], max_tokens
    for trace in traces.traces:
        uses.append(expert_use_TLE(trace, num_experts)[:num_left].astype(bool))
        num_left -= len(uses[-1])
        if num_left == 0:
            break
    popularity_LE = np.concatenate(uses).mean(0)
    overlaps = [(use_TLE[1:] & use_TLE[:-1]).sum(-1) for use_TLE in uses if len(use_TLE) > 1]
    gaps = np.concatenate([_gaps(use_TLE) for use_TLE in uses])

    def fixed(chosen_from: Sequence[npt.NDArray[Any]], count: int) -> float:
        hits = total = 0
        for use_TLE, even_LE in zip(uses, chosen_from, strict=True):
            kept_LC = np.argsort(-even_LE, axis=-1, kind="stable")[:, :count]
            hits += int(np.take_along_axis(use_TLE[1::2], kept_LC[None], axis=-1).sum())
            total += int(use_TLE[1::2].sum())
        return hits / total

    even_of_each = [use_TLE[::2].sum(0) for use_TLE in uses]
    even_of_all = [np.sum(even_of_each, axis=0)] * len(uses)
    return {
        "tokens_per_request": float(np.mean([len(use_TLE) for use_TLE in uses])),
        "overlap": float(np.concatenate(overlaps).mean()) / top_k,
        "overlap_by_chance": float((popularity_LE**2).sum(-1).mean()) / top_k,
        "reused_within": {str(n): float((gaps <= n).mean()) for n in (1, 4, 16, 64)},
        "fixed_hit": {
            str(count): {"all": fixed(even_of_all, count), "request": fixed(even_of_each, count)}
            for count in slots
        },
    }


def _gaps(use_TLE: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Tokens since the last use in this request, of every use; a large number for the first."""
    index = np.arange(1, len(use_TLE) + 1)[:, None, None]
    latest_TLE = np.maximum.accumulate(np.where(use_TLE, index, 0), axis=0)
    before_TLE = np.concatenate([np.zeros_like(latest_TLE[:1]), latest_TLE[:-1]])
    gap_TLE = np.where(before_TLE > 0, index - before_TLE, np.iinfo(np.int64).max)
    gaps: npt.NDArray[Any] = gap_TLE[use_TLE]
    return gaps
