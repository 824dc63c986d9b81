"""What a predictor costs: parameters, and time per token while it streams.

Knows nothing of how good it is. Times are wall time of the calls that serving makes; making the
expert map that they are given is not theirs, and is left out.

Shape letters: L MoE layers · E experts per layer.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from data.schema import Trace
from predictors.base import Predictor, Request

_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCost:
    """Microseconds of wall time, one request at a time.

    Attributes:
        num_tokens: That were timed.
        us_per_token: Everything, `on_request` included, over all tokens.
        us_per_token_median: Of a token's `on_routed` calls and its `on_token`; robust against what
            else runs on the machine.
        us_per_request: Of one `on_request`.
        us_per_routed: Of one `on_routed`, that is, of a layer; None where it is not called.
    """

    num_tokens: int
    us_per_token: float
    us_per_token_median: float
    us_per_request: float
    us_per_routed: float | None


def num_parameters(predictor: Predictor) -> int:
    """Floating-point numbers among what it learned; the vectors of an index are not among them."""
    tensors = predictor.tensors().values()
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


@torch.no_grad()
def measure_stream(
    predictor: Predictor,
    traces: Iterable[Trace],
    *,
    max_tokens: int = 256,
    device: torch.device | str = "cpu",
) -> StreamCost:
    """Time a predictor over the first tokens of some requests, as serving calls it.

    Args:
        predictor: A fitted one, on ``device``; with `needs_truth` it is given the truth.
        traces: Requests with at least one token among them; as many are read as needed.
        max_tokens: To time.
        device: Where expert maps are handed over; a CUDA device is waited for after every call.

    Raises:
        ValueError: There is no token.
    """
    spec = predictor.fitted_spec()
    device = torch.device(device)
    request_s: list[float] = []
    routed_s: list[float] = []
    token_s: list[float] = []  # its `on_routed` calls included
    num_warm_up = _WARM_UP_TOKENS
    for trace in traces:
        if not trace.num_tokens:
            continue
        state = predictor.new_state()
        request = Request.of(trace, with_truth=predictor.needs_truth)
        start_s = time.perf_counter()
        predictor.on_request(state, request)
        _wait(device)
        request_s.append(time.perf_counter() - start_s)
        ids_P, first = trace.token_ids_P, trace.first_routed_position
        for t in range(trace.num_tokens - 1):
            expert_map_LE = torch.from_numpy(trace.expert_map_LE(t, spec.num_experts)).to(device)
            ids = {
                "token_id": None if ids_P is None else int(ids_P[first + t]),
                "next_token_id": None if ids_P is None else int(ids_P[first + t + 1]),
            }
            start_s = time.perf_counter()
            layers = expert_map_LE.unbind(0) if "routed" in predictor.moments else ()
            for layer, probs_E in enumerate(layers):
                predictor.on_routed(state, layer, probs_E)
            _wait(device)
            between_s = time.perf_counter()
            predictor.on_token(state, expert_map_LE, **ids)
            _wait(device)
            end_s = time.perf_counter()
            if num_warm_up:
                num_warm_up -= 1
                continue
            routed_s.append(between_s - start_s)
            token_s.append(end_s - start_s)
            if len(token_s) == max_tokens:
                break
        if len(token_s) == max_tokens:
            break
    if not request_s:
        raise ValueError("no token to time a predictor on")
    num_tokens = max(1, len(token_s))
    # The first request may load or build something; it counts only if it is the only one.
    per_request_s = request_s[1:] or request_s
    mean_request_s = sum(per_request_s) / len(per_request_s)
    total_s = mean_request_s * len(request_s) + sum(token_s)
    speaks = "routed" in predictor.moments and bool(token_s)
    return StreamCost(
        num_tokens=len(token_s),
        us_per_token=1e6 * total_s / num_tokens,
        us_per_token_median=1e6 * (median(token_s) if token_s else mean_request_s),
        us_per_request=1e6 * mean_request_s,
        us_per_routed=1e6 * sum(routed_s) / (num_tokens * spec.num_layers) if speaks else None,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
