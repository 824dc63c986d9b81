"""What the tables say follows from the replays, and the benchmark's own policies do as they say."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.frequency_policies import LfuOfEachRequest
from benchmarks.paper_orderings import (
    Bench,
    Row,
    in_order,
    measure_moepic,
    named,
    stays,
    summary,
    verdicts,
)
from data.importers.per_token_npz import read_per_token_npz
from data.schema import MoESpec, Trace, TraceList
from runtime.replay import EventList


def two_requests(num_tokens: int = 40) -> TraceList:
    """Two layers of 8 experts, top-2; the second request uses other experts than the first."""
    rnd = random.Random(3)
    traces = [
        Trace(
            request_id=str(i),
            source="test",
            topic="",
            topk_expert_ids_TLK=np.array(
                [[rnd.sample(range(4 * i, 4 * i + 4), 2) for _ in range(2)] for _ in range(40)],
                np.uint8,
            )[:num_tokens],
            num_prompt_tokens=0,
            first_routed_position=0,
        )
        for i in range(2)
    ]
    spec = MoESpec(
        model_id="test",
        num_experts=8,
        top_k=2,
        decoder_layers=(0, 1),
        expert_bytes_per_layer=None,
    )
    return TraceList(spec=spec, traces=traces, split={}, digest="test")


def test_lfu_of_each_request_is_lfu_until_the_first_change_and_forgets_there() -> None:
    traces = two_requests()
    bench = Bench("test", 80, {})
    first = TraceList(spec=traces.spec, traces=traces.traces[:1], split={}, digest="test")
    for name, of in (("one", first), ("two", traces)):
        policies = named("lfu") | {"mine": LfuOfEachRequest(EventList.of(of))}
        bench.replay("aging", of, policies, [3], variant=name)

    def hits(variant: str, policy: str) -> float:
        (run,) = bench.measured[Row("aging", "test", variant, policy, 3)]
        assert run["hit_ratio"] is not None
        return run["hit_ratio"]

    assert hits("one", "mine") == hits("one", "lfu")
    # Forty tokens of other experts make the old counts worthless, and LFU still holds on to them.
    assert hits("two", "mine") > hits("two", "lfu") + 0.05


def test_a_seed_orders_the_requests_and_another_orders_them_differently() -> None:
    traces = two_requests()
    orders = {tuple(t.request_id for t in in_order(traces, seed).traces) for seed in range(8)}
    assert orders == {("0", "1"), ("1", "0")}


def test_stays_are_told_by_how_they_end() -> None:
    """One layer, top-1, two slots: 1 and 2 are used once and evicted, and 1 comes back at once."""
    request = [[[0]], [[0]], [[1]], [[2]], [[1]], [[3]]]
    trace = replace(two_requests().traces[0], topk_expert_ids_TLK=np.array(request, np.uint8))
    spec = replace(two_requests().spec, top_k=1, decoder_layers=(0,))
    traces = TraceList(spec=spec, traces=[trace], split={}, digest="test")
    found = stays(traces, 2, max_tokens=99)
    # LFU of each stay: 0 has two visits and stays; 1, 2 and 1 again are evicted after one.
    assert found["lfu of each stay"] == {"used_once": 1.0, "back_within_16": pytest.approx(1 / 3)}
    # LRU evicts 0 after two uses, then 1's neighbour 2 for 3: 1 was still there.
    assert found["lru"] == {"used_once": 0.5, "back_within_16": 0.0}


def hit_ratios(*each: float) -> list[dict[str, float | None]]:
    return [{"hit_ratio": value, "gap_closed": None} for value in each]


def test_an_order_holds_if_every_mean_step_goes_up() -> None:
    def row(policy: str, table="moepic", variant: str = "") -> Row:
        return Row(table, "test", variant, policy, 4)

    measured = {
        row("random"): hit_ratios(0.1, 0.1, 0.1),
        row("lru"): hit_ratios(0.2, 0.2, 0.2),
        row("lfu"): hit_ratios(0.30, 0.31, 0.19),
        row("lcp"): hit_ratios(0.4, 0.4, 0.4),
        row("lru", "finemoe"): hit_ratios(0.2, 0.2),
        row("lfu", "finemoe"): hit_ratios(0.1, 0.1),
        row("p * count", "finemoe", "semantic"): hit_ratios(0.3, 0.3),
    }
    table_1, fig_14b = verdicts(measured)
    assert (table_1["outcome"], table_1["seeds_that_hold"]) == ("holds", 2)
    assert table_1["points_mean"] == pytest.approx([10, 20 / 3, 40 / 3], abs=1e-4)
    assert fig_14b["order"] == ("lru", "lfu", "p * count")
    assert (fig_14b["outcome"], fig_14b["variant"]) == ("fails", "semantic")
    assert fig_14b["points_mean"] == pytest.approx([-10, 20])


def test_policies_that_hit_alike_neither_hold_nor_fail() -> None:
    measured = {
        Row("moepic", "test", "", policy, 8): hit_ratios(0.5, 0.6, 0.7)
        for policy in ("random", "lru", "lfu", "lcp")
    }
    (verdict,) = verdicts(measured)
    assert (verdict["outcome"], verdict["seeds_that_hold"]) == ("all equal", 0)


def test_a_summary_leaves_out_gaps_that_do_not_exist() -> None:
    found = summary(hit_ratios(0.2, 0.4))
    assert found["hit_ratio"]["mean"] == pytest.approx(0.3)
    assert found["hit_ratio"]["sd"] == pytest.approx(0.1 * 2**0.5, abs=1e-6)
    assert found["gap_closed"] == {"mean": None, "sd": None, "each": []}


def test_moepics_order_comes_out_on_real_routing_of_intent_questions(shared_data: Path) -> None:
    file = shared_data / "traces" / "esft_dsv2lite" / "esft_intent.npz"
    bench = Bench("esft_intent", 400, {})
    measure_moepic(bench, read_per_token_npz(file))
    assert {verdict["slots"] for verdict in verdicts(bench.measured)} == {11, 21, 32, 43, 53}
    for verdict in verdicts(bench.measured):
        random_lru, lru_lfu, lfu_lcp = verdict["points_mean"]
        assert random_lru > 0.2
        assert lru_lfu > 0.2
        assert lfu_lcp > -0.5  # 400 tokens are three idle periods of LCP: it has little to forget
