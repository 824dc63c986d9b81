"""Routing turned into counts: which experts a trace used, and which of its rows count.

One rule for fitting and for judging, so that both look at the same rows. Knows nothing of any
predictor.

Shape letters: L MoE layers · E experts per layer · K experts per token · T tokens.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.schema import Split, Trace, TraceSet


def expert_use_TLE(trace: Trace, num_experts: int) -> npt.NDArray[np.uint8]:
    """uint8 [T, L, E]: 1 where the token used the expert; every [t, l] row sums to K."""
    ids_TLK = trace.topk_expert_ids_TLK.astype(np.int64)
    use_TLE = np.zeros((*ids_TLK.shape[:2], num_experts), np.uint8)
    np.put_along_axis(use_TLE, ids_TLK, 1, axis=-1)
    return use_TLE


def decode_rows(trace: Trace) -> slice:
    """The rows of decode steps; every row where only prefill was recorded.

    Forecasts of the next token are spent while decoding, and prefill tokens arrive all at once, so
    they would only blur what is learned and what is reported.
    """
    first = trace.num_prefill_tokens
    return slice(first if first < trace.num_tokens else 0, trace.num_tokens)


def traces_of(traces: TraceSet, split: Split) -> Iterator[Trace]:
    """The traces of one split, in the set's order, read one at a time."""
    for index in range(len(traces)):
        trace = traces[index]
        if traces.split[trace.request_id] == split:
            yield trace


def request_digest(trace: Trace) -> str:
    """What names a request by its routing alone, wherever it is stored: 16 hex digits."""
    ids_TLK = np.ascontiguousarray(trace.topk_expert_ids_TLK, dtype="<i2")
    digest = hashlib.blake2b(repr(ids_TLK.shape).encode(), digest_size=8)
    digest.update(ids_TLK.tobytes())
    return digest.hexdigest()


def request_use_LE(trace: Trace, num_experts: int) -> npt.NDArray[np.float32]:
    """float32 [L, E]: the share of the trace's decode rows that used each expert."""
    use_TLE = expert_use_TLE(trace, num_experts)[decode_rows(trace)]
    use_LE: npt.NDArray[np.float32] = use_TLE.mean(axis=0, dtype=np.float32)
    return use_LE


def mean_use_LE(traces: TraceSet, split: Split = "fit") -> tuple[Tensor, int, int]:
    """Mean use per (layer, expert) over all decode rows of a split: popularity.

    Returns:
        float32 [L, E] whose rows sum to K, the number of requests, and the number of rows.

    Raises:
        ValueError: The split has no rows.
    """
    spec = traces.spec
    total_LE = np.zeros((spec.num_layers, spec.num_experts), np.int64)
    num_requests = num_tokens = 0
    for trace in traces_of(traces, split):
        use_TLE = expert_use_TLE(trace, spec.num_experts)[decode_rows(trace)]
        total_LE += use_TLE.sum(axis=0, dtype=np.int64)
        num_requests += 1
        num_tokens += len(use_TLE)
    if not num_tokens:
        raise ValueError(
            f"no routed token has split {split!r} among the {len(traces)} requests of "
            f"{spec.describe()}: nothing to learn from"
        )
    return torch.from_numpy(total_LE / num_tokens).float(), num_requests, num_tokens
