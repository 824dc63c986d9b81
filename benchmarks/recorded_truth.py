"""The simulator against engines that were recorded: does it hit what they hit?

    python -m benchmarks.recorded_truth out=benchmarks/results/recorded_truth.json

Three BigMoeOnEdge runs (folder MOECAST_DATA) wrote down every access and whether its expert was
resident. The same routing is replayed here under the same rules: one global LRU of the same bytes,
a prompt as one event per layer. Compared are the hit ratios, and, access by access, residency.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import record
from data.cli import parse_cli
from data.importers.bigmoe_route import RecordedRoute, read_bigmoe_route
from data.importers.catalog import trace_files
from runtime.cache import ExpertCache
from runtime.policies import make_policy
from runtime.replay import EventList
from runtime.simulate import simulate

BUDGETS_BYTES = {"qwen": 4000 << 20, "gemma": 4000 << 20, "gptoss120b": 3000 << 20}


@dataclass
class Args:
    """Replay what was recorded and compare."""

    out: Path | None = None


def compare(name: str, budget_bytes: int) -> dict[str, Any]:
    """One run: recorded and replayed hit ratios, and the share of accesses that agree."""
    (file,) = trace_files(name)
    route = read_bigmoe_route(file)
    results = {
        result.policy: result
        for result in simulate(
            route.traces,
            policies=["lru", "lfru", "belady"],
            budget_bytes=[budget_bytes],
            scope="global",
        )
    }
    found, recorded = residency(route, budget_bytes)
    lru = results["lru"]
    return {
        "trace": name,
        "model": route.traces.spec.describe(),
        "budget_bytes": budget_bytes,
        "decode_accesses": len(found),
        "recorded_decode_hit_ratio": float(recorded.mean()),
        # Every prompt access was recorded as a miss, in an empty cache.
        "recorded_hit_ratio": float(recorded.sum() / lru.accesses),
        "replayed_decode_hit_ratio": lru.decode_hit_ratio,
        "replayed_hit_ratio": lru.hit_ratio,
        "agreement": float((found == recorded).mean()),
        "lfru_hit_ratio": results["lfru"].hit_ratio,
        "belady_hit_ratio": results["belady"].hit_ratio,
    }


def residency(route: RecordedRoute, budget_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Per decode access: was the expert resident in our cache, and in the recorded engine?"""
    spec = route.traces.spec
    cache = ExpertCache(
        make_policy("lru"),
        num_layers=1,
        num_experts=spec.num_layers * spec.num_experts,
        budget_bytes=budget_bytes,
        expert_bytes_LE=torch.tensor(spec.expert_bytes_per_layer).repeat_interleave(
            spec.num_experts
        )[None],
        with_slots=False,
    )
    found, recorded = [], []
    for event in EventList.of(route.traces):
        for layer in range(spec.num_layers):
            needed_J = torch.zeros(cache.num_experts, dtype=torch.bool)
            needed_J[event.index_NLK[:, layer].flatten()] = True
            step = cache.step(needed_J, layer=0, max_needed=event.max_needed)
            if not event.is_prompt:
                found.append(step.hit_LE[event.index_NLK[0, layer]].numpy())
                recorded.append(route.resident_TLK[0][event.first_row, layer])
    return np.concatenate(found), np.concatenate(recorded)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    args = parse_cli(Args, argv)
    rows = [compare(name, budget_bytes) for name, budget_bytes in BUDGETS_BYTES.items()]
    for row in rows:
        print(
            f"{row['trace']:>10}  recorded {row['recorded_hit_ratio']:.2%}  "
            f"replayed {row['replayed_hit_ratio']:.2%}  agreement {row['agreement']:.3%}"
        )
    record("recorded_truth", {"rows": rows}, out=args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
