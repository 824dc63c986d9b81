"""Replays of real traces come to the hits that were recorded or published."""

import itertools
from pathlib import Path

import pytest
import torch

from data.importers.bigmoe_route import RecordedRoute, read_bigmoe_route
from data.importers.per_token_npz import read_per_token_npz
from runtime.cache import ExpertCache
from runtime.policies import make_policy
from runtime.replay import EventList
from runtime.simulate import simulate

MIB = 2**20
RECORDED = {"qwen": 4000, "gemma": 4000, "gptoss": 3000}  # file: the engine's budget in MiB
RECORDED_HIT_PERCENT = {"qwen": (74.9, 80.3), "gemma": (76.8, 81.9), "gptoss": (32.4, 44.8)}
# Published replays, decode hits of LRU, LFU and Belady in per cent at 3000 and 4000 MiB.
PUBLISHED = {
    "qwen": ((70.6, 80.3), (71.3, 80.8), (87.8, 92.7)),
    "gemma": ((73.1, 81.9), (75.5, 83.4), (88.6, 92.9)),
    "gptoss": ((44.8,), (43.6,), (67.8,)),
}


def route(name: str, shared_data: Path) -> RecordedRoute:
    return read_bigmoe_route(shared_data / f"traces/bigmoe_routes/{name}.route.csv.gz")


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_and_published_hit_ratios_of_a_global_pool_come_out(
    name: str, shared_data: Path
) -> None:
    published = PUBLISHED[name]
    budgets = [3000 * MIB, 4000 * MIB][: len(published[0])]
    results = simulate(
        route(name, shared_data).traces,
        policies=["lru", "lfu", "belady"],
        budget_bytes=budgets,
        scope="global",
    )
    decode = [100 * result.decode_hit_ratio for result in results]
    assert decode == pytest.approx(list(itertools.chain(*published)), abs=0.1)
    recorded = next(r for r in results if r.budget_bytes == RECORDED[name] * MIB)
    found = (100 * recorded.hit_ratio, 100 * recorded.decode_hit_ratio)
    assert found == pytest.approx(RECORDED_HIT_PERCENT[name], abs=0.1)


@pytest.mark.parametrize("name", RECORDED)
def test_a_global_lru_holds_what_the_recorded_engine_held(name: str, shared_data: Path) -> None:
    """Expert by expert: was it resident when it was asked for?"""
    recorded = route(name, shared_data)
    spec = recorded.traces.spec
    sizes_L = torch.tensor(spec.expert_bytes_per_layer)
    cache = ExpertCache(
        make_policy("lru"),
        num_layers=1,
        num_experts=spec.num_layers * spec.num_experts,
        budget_bytes=RECORDED[name] * MIB,
        expert_bytes_LE=sizes_L.repeat_interleave(spec.num_experts)[None],
        with_slots=False,
    )
    agreeing = total = 0
    for event in EventList.of(recorded.traces):
        for layer in range(spec.num_layers):
            needed_J = torch.zeros(cache.num_experts, dtype=torch.bool)
            needed_J[event.index_NLK[:, layer].flatten()] = True
            step = cache.step(needed_J, layer=0, max_needed=event.max_needed)
            if not event.is_prompt:
                found_K = step.hit_LE[event.index_NLK[0, layer]]
                recorded_K = torch.from_numpy(recorded.resident_TLK[0][event.first_row, layer])
                agreeing += int((found_K == recorded_K).sum())
                total += len(found_K)
    assert agreeing / total >= 0.998
    cache.check_integrity()


# Hit ratios of LRU, LFU, LFRU, Belady by slots, from the data's own description.
REFERENCE_POLICIES = ["lru", "lfu", "lfru", "belady"]
GPTOSS = {
    8: (0.653, 0.631, 0.673, 0.771),
    13: (0.829, 0.795, 0.844, 0.909),
    16: (0.894, 0.863, 0.904, 0.947),
}
ESFT_LAW = {16: (0.497, 0.504, 0.518, 0.680), 32: (0.729, 0.743, 0.751, 0.876)}


@pytest.mark.parametrize(
    ("file", "reference", "max_tokens"),
    [
        ("esft_dsv2lite/esft_law.npz", ESFT_LAW, None),
        pytest.param("gptoss20b/gptoss20b_ship.npz", GPTOSS, 30_000, marks=pytest.mark.slow),
    ],
)
def test_reference_points_of_the_real_traces_come_out(
    file: str, reference: dict, max_tokens: int | None, shared_data: Path
) -> None:
    results = simulate(
        read_per_token_npz(shared_data / "traces" / file),
        policies=REFERENCE_POLICIES,
        slots=list(reference),
        max_tokens=max_tokens,
    )
    for result in results:
        expected = reference[result.slots][REFERENCE_POLICIES.index(result.policy)]
        assert result.hit_ratio == pytest.approx(expected, abs=0.002), result
