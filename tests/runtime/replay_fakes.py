"""Small traces, and a predictor that sees the future, for tests of replays."""

import random
from collections.abc import Sequence

import numpy as np
import torch

from data.schema import MoESpec, Trace, TraceList
from predictors.base import FitReport, Forecast, Predictor, Request, State
from runtime.simulate import Result, simulate

ALL_HEURISTICS = ["fifo", "lru", "lfu", "lfru", "lcp", "least_stale", "random", "belady"]


def trace_list(
    *requests: Sequence,
    num_experts: int = 6,
    prompts: Sequence[int] = (),
    expert_bytes: Sequence[int] | None = None,
) -> TraceList:
    """One trace a request, each [T][L][K] expert ids; ``prompts`` are their prompt lengths."""
    arrays = [np.asarray(request, np.uint8) for request in requests]
    _, num_layers, top_k = arrays[0].shape
    traces = [
        Trace(
            request_id=str(i),
            source="test",
            topic="",
            topk_expert_ids_TLK=array,
            num_prompt_tokens=prompts[i] if prompts else 0,
            first_routed_position=0,
        )
        for i, array in enumerate(arrays)
    ]
    spec = MoESpec(
        model_id="test",
        num_experts=num_experts,
        top_k=top_k,
        decoder_layers=tuple(range(num_layers)),
        expert_bytes_per_layer=tuple(expert_bytes) if expert_bytes else None,
    )
    return TraceList(spec=spec, traces=traces, split={}, digest="test")


def random_request(rnd: random.Random, num_tokens: int, *, num_layers=2, num_experts=6, top_k=2):
    return [
        [rnd.sample(range(num_experts), top_k) for _ in range(num_layers)]
        for _ in range(num_tokens)
    ]


def golden_traces() -> TraceList:
    """Three requests of 200 tokens, 3 layers x 16 experts, top-2: skewed, drifting, repetitive."""
    rnd = random.Random(20)
    requests = []
    for request in range(3):
        rows, previous = [], [[0, 1]] * 3
        for t in range(200):
            row = []
            for layer in range(3):
                drift = 5 * request + t // 40 + layer
                chosen = [e for e in previous[layer] if rnd.random() < 0.45]
                while len(chosen) < 2:
                    expert = (int(rnd.expovariate(0.3)) + drift) % 16
                    if expert not in chosen:
                        chosen.append(expert)
                row.append(chosen)
            rows.append(row)
            previous = row
        requests.append(rows)
    return trace_list(*requests, num_experts=16)


class Seer(Predictor):
    """Sees each request's future; forecasts are exact up to the discount."""

    kind = "seer"
    moments = frozenset({"request", "token"})

    def fit(self, traces) -> FitReport:
        self.spec = traces.spec
        return FitReport(num_requests=len(traces), num_tokens=0, fit_s=0.0)

    def on_request(self, state: State, request: Request) -> Forecast:
        self.ids_TLK = torch.from_numpy(request.truth.topk_expert_ids_TLK).long()
        self.rows_asked = [0]
        return self.look(0)

    def on_token(self, state: State, expert_map_LE, **ids) -> Forecast:
        state.num_tokens += 1
        self.rows_asked.append(state.num_tokens)
        return self.look(state.num_tokens)

    def look(self, row: int) -> Forecast:
        use_TLE = torch.zeros(
            len(self.ids_TLK), self.spec.num_layers, self.spec.num_experts, dtype=torch.float64
        ).scatter_(-1, self.ids_TLK, 1)[row:]
        weight_T = self.gamma ** torch.arange(len(use_TLE))
        total_LE = (weight_T[:, None, None] * use_TLE).sum(0)
        return Forecast(use_TLE[0].float(), total_LE.float())

    def config(self):
        return {}

    def tensors(self):
        return {}

    def load_state(self, spec, tensors) -> None:
        self.spec = spec


def by_policy(results: Sequence[Result]) -> dict[str, Result]:
    assert len({result.policy for result in results}) == len(results)
    return {result.policy: result for result in results}


def run(traces: TraceList, *policies: str, **kwargs) -> dict[str, Result]:
    return by_policy(simulate(traces, policies=policies or ALL_HEURISTICS, **kwargs))
