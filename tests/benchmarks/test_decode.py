"""The decode benchmark's parts on tiny models: what it forces, counts, compares and reports."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import decode as benchmark
from benchmarks import live_testbed, readme
from benchmarks.decode_report import Samples, percentile, summary, text_table
from benchmarks.decode_rows import Row, StockRow, Traffic
from benchmarks.decode_timer import Timer
from benchmarks.forced_routing import Route
from benchmarks.graph_rows import OwnRow
from benchmarks.offload_baselines import HostSyncLru, matrix_expert
from benchmarks.options import parse_options
from benchmarks.replay_shapes import SHAPES
from benchmarks.replay_testbed import ReplayTestbed, filled_store
from data.schema import Trace, TraceList
from data.tiny_moe import TINY_MOE_DIR
from predictors.forecaster import Forecaster
from predictors.graph import GraphPredictor
from runtime.cache import ExpertCache
from runtime.experts import expert_forward
from runtime.policies import make_policy
from runtime.prefetch.options import PrefetchOptions
from tests.devices import KERNEL_DEVICE

TOKENS = 5


@pytest.fixture(params=list(SHAPES))
def bed(request: pytest.FixtureRequest) -> ReplayTestbed:
    return ReplayTestbed(
        SHAPES[request.param].small(),
        device=torch.device("cpu"),
        num_tokens=TOKENS,
        dtype=torch.float32,
    )


def decode(row: Row) -> tuple[list[int], Tensor]:
    row.prepare()
    said = []
    with torch.no_grad():
        for _ in range(TOKENS):
            row.step()
            said.append(int(row.testbed.token_BT))
    logits_BTV = row.testbed.logits_BTV
    return said, logits_BTV


def test_a_model_routes_as_recorded_and_stays_finite(bed: ReplayTestbed) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    for moe in bed.layers:
        moe.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:]))
    _, logits_BTV = decode(StockRow(bed, "eager"))
    assert logits_BTV.isfinite().all()
    assert 0.1 < float(logits_BTV.std()) < 10
    measured = slice(bed.warm, bed.warm + TOKENS)
    ids_NLK = torch.stack([ids_TK[0] for ids_TK, _ in seen]).view(TOKENS, bed.num_layers, -1)
    weights_NLK = torch.stack([weights_TK[0] for _, weights_TK in seen]).view_as(ids_NLK)
    assert torch.equal(ids_NLK, bed.routes[0].ids_NLK[measured])
    assert torch.equal(weights_NLK, bed.routes[0].weights_NLK[measured])
    assert torch.allclose(weights_NLK.sum(-1), torch.ones(TOKENS, bed.num_layers))


def test_stock_implementations_say_the_same_and_every_run_starts_anew(bed: ReplayTestbed) -> None:
    eager = StockRow(bed, "eager")
    said, logits_BTV = decode(eager)
    again, again_BTV = decode(eager)
    assert said == again
    assert torch.equal(logits_BTV, again_BTV)
    others, others_BTV = decode(StockRow(bed, "grouped_mm"))
    assert others == said
    torch.testing.assert_close(others_BTV, logits_BTV, rtol=1e-3, atol=1e-4)
    accesses = TOKENS * bed.num_layers * bed.top_k
    assert eager.traffic() == Traffic(accesses=accesses, hits=accesses)


def test_the_truth_is_ready_before_a_tokens_first_experts(bed: ReplayTestbed) -> None:
    seen: list[Tensor] = []
    bed.layers[0].experts.register_forward_pre_hook(
        lambda *_: seen.append(bed.forced.forecast_LE.clone())
    )
    decode(StockRow(bed, "eager"))
    assert torch.equal(torch.stack(seen), bed.routes[0].next_use_NLE[bed.warm : bed.warm + TOKENS])


def test_next_use_looks_past_the_present_token() -> None:
    ids_NLK = torch.tensor([[[0, 1]], [[1, 2]], [[0, 2]]])
    route = Route.of(ids_NLK, torch.ones(3, 1, 2), 4, "")
    never = -torch.inf
    assert route.next_use_NLE[:, 0].tolist() == [
        [-2, -1, -1, never],
        [-2, never, -2, never],
        [never] * 4,
    ]


def test_a_recorded_trace_must_fit_and_suffice(shared_data: Path) -> None:
    shape = SHAPES["qwen3_30b"]
    route = Route.recorded(shape, 144, num_layers=48, num_experts=128)
    assert route.ids_NLK.shape == (144, 48, 6)
    assert torch.allclose(route.weights_NLK.sum(-1), torch.ones(144, 48))
    with pytest.raises(ValueError, match="has 156 tokens: 200 are needed"):
        Route.recorded(shape, 200, num_layers=48, num_experts=128)
    with pytest.raises(ValueError, match="the model has 47 MoE layers"):
        Route.recorded(shape, 10, num_layers=47, num_experts=128)


def test_every_shapes_trace_is_there_for_its_warm_up(shared_data: Path) -> None:
    layers_of = {"gptoss20b": (24, 32), "dsv2lite": (26, 64), "qwen3_30b": (48, 128)}
    for name, (num_layers, num_experts) in layers_of.items():
        shape = SHAPES[name]
        Route.recorded(shape, shape.warm + 64, num_layers=num_layers, num_experts=num_experts)


def test_the_host_synchronised_lru_hits_what_the_cache_with_lru_hits(bed: ReplayTestbed) -> None:
    slots = bed.num_experts // 2
    row = HostSyncLru(bed, slots=slots, records_LEP=[bed.block_EP] * bed.num_layers)
    decode(row)
    traffic = row.traffic()
    cache = ExpertCache(
        make_policy("lru"), num_layers=bed.num_layers, num_experts=bed.num_experts, slots=slots
    )
    hits = 0
    for n, ids_LK in enumerate(bed.routes[0].ids_NLK):
        needed_LE = torch.zeros(bed.num_layers, bed.num_experts, dtype=torch.bool)
        hits_L1 = cache.step(needed_LE.scatter(1, ids_LK, True)).num_hits_L1
        hits += int(hits_L1.sum()) if n >= bed.warm else 0
    assert traffic.hits == hits
    assert 0 < traffic.hits < traffic.accesses == TOKENS * bed.num_layers * bed.top_k
    misses = traffic.accesses - traffic.hits
    assert traffic.missed_bytes == misses * bed.layout.record_bytes
    row.finish()
    row.close()


def test_the_host_synchronised_lru_computes_alike_at_every_size(bed: ReplayTestbed) -> None:
    """Its slots hold what it believes them to hold: a stale slot would change the logits."""
    outputs = []
    for slots in (bed.top_k, bed.num_experts):
        # Different experts in every layer, so that a mix-up of layers shows as well.
        records_LEP = [bed.block_EP.roll(layer, 0) for layer in range(bed.num_layers)]
        row = HostSyncLru(bed, slots=slots, records_LEP=records_LEP)
        row.prepare()
        for layer, held in enumerate(row._slot_of):  # the block stands for layer 0 alone
            for expert, slot in held.items():
                row._slots_LCP[layer][slot] = records_LEP[layer][expert]
        with torch.no_grad():
            for _ in range(TOKENS):
                row.step()
        outputs.append(bed.logits_BTV)
        row.close()
    assert torch.equal(*outputs)


def test_rows_of_a_batch_replay_parts_of_their_own_and_may_need_more_than_fits() -> None:
    bed = ReplayTestbed(
        SHAPES["gptoss20b"].small(),
        device=torch.device(KERNEL_DEVICE),
        num_tokens=12,
        dtype=torch.float32,
        batch=3,
    )
    ids_NBLK = bed.forced.ids_NBLK
    assert not torch.equal(ids_NBLK[:, 0], ids_NBLK[:, 1])
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    slots = 2 * bed.top_k  # three tokens need up to three times as many
    rows = [
        StockRow(bed, "eager"),
        HostSyncLru(bed, slots=slots, records_LEP=store.records_LEP),
        OwnRow(bed, store, "lru", slots=slots),
        OwnRow(bed, store, "belady", slots=slots),
    ]
    logits, traffic = [], []
    for row in rows:
        row.prepare()
        with torch.no_grad():
            for _ in range(12):
                row.step()
        logits.append(bed.logits_BTV.clone())
        traffic.append(row.traffic())
        row.finish()
    measured = ids_NBLK[bed.warm :].transpose(1, 2).flatten(2)  # [N, L, B * K]
    needed = sum(len(ids.unique()) for ids in measured.flatten(0, 1))
    _, host, lru, belady = traffic
    assert host.accesses == lru.accesses == belady.accesses == needed
    assert host.hits <= lru.hits <= belady.hits
    assert max(len(ids.unique()) for ids in measured.flatten(0, 1)) > slots
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(logits[2], logits[3])


def test_a_forecaster_in_the_graph_keeps_what_it_keeps_in_the_simulator() -> None:
    bed = ReplayTestbed(
        SHAPES["gptoss20b"].small(),
        device=torch.device(KERNEL_DEVICE),
        num_tokens=TOKENS,
        dtype=torch.float32,
    )
    second = bed.warm + 2  # where another request begins, in the middle of what is measured
    bed.routes[0] = replace(
        bed.routes[0],
        starts_N=torch.isin(torch.arange(len(bed.routes[0].ids_NLK)), torch.tensor([0, second])),
    )
    sizes = {"num_layers": bed.num_layers, "num_experts": bed.num_experts}
    others = [Route.drawn(30, top_k=bed.top_k, **sizes) for _ in range(4)]
    forecaster = Forecaster(hidden_dim=16, epochs=4, batch_size=16, trainer={"accelerator": "cpu"})
    forecaster.fit(
        TraceList(
            traces=[trace_of(route, slice(0, 30), f"r{n}") for n, route in enumerate(others)],
            spec=bed.spec,
            split={f"r{n}": "fit" for n in range(4)},
            digest="drawn",
        )
    )
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    row = OwnRow(bed, store, "forecast", slots=3, predictor=forecaster)
    decode(row)
    plain = ExpertCache(make_policy("forecast"), slots=3, **sizes)
    hits = n = 0
    for part in (slice(0, second), slice(second, bed.warm + TOKENS)):
        walked = forecaster.walk(trace_of(bed.routes[0], part, "judged"))
        assert walked.later_TLE is not None
        for later_LE, ids_LK in zip(walked.later_TLE, bed.routes[0].ids_NLK[part], strict=True):
            for layer in range(bed.num_layers):
                needed_E = torch.zeros(bed.num_experts, dtype=torch.bool)
                needed_E[ids_LK[layer]] = True
                step = plain.step(needed_E, layer=layer, forecast_LE=later_LE[layer])
                hits += int(step.hit_LE.sum()) * (n >= bed.warm)
            n += 1
    assert row.traffic().hits == hits
    assert row.traffic().accesses == TOKENS * bed.num_layers * bed.top_k


def test_a_row_with_the_cpu_lane_says_what_the_others_say_up_to_rounding() -> None:
    bed = ReplayTestbed(
        SHAPES["gptoss20b"].small(), device=torch.device("cpu"), num_tokens=4, dtype=torch.bfloat16
    )
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    timer = Timer(bed, repeats=1, tokens=4)
    rows = [OwnRow(bed, store, "lfru", slots=3, cpu_lane=lane) for lane in (False, True)]
    plain, with_lane = timer.time(rows).values()
    assert not timer.failed
    assert rows[1].name == "ours, lfru + CPU lane"
    assert plain.exact is True
    assert with_lane.exact is None
    assert with_lane.difference is not None
    assert with_lane.difference < 2e-2
    assert rows[1].cpu_bytes_per_s > 0 == rows[0].cpu_bytes_per_s


@pytest.mark.parametrize("into", ["slots", "landing"])
def test_prefetching_rows_say_the_same_and_miss_less(into: Literal["slots", "landing"]) -> None:
    """By a predictor that knows each layer's favourites, and by the truth."""
    bed = ReplayTestbed(
        SHAPES["gptoss20b"].small(),
        device=torch.device("cpu"),
        num_tokens=TOKENS,
        dtype=torch.float32,
    )
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    favourites = Favourites(bed.routes[0].ids_NLK, bed.num_experts)
    options = PrefetchOptions(
        into=into,
        window_s=2.0,
        link_bytes_per_s=float(bed.layout.record_bytes),
        displaced_use=0.4,
        programs_per_record=2,
    )
    traffic, said = {}, {}
    for prefetch_by in ("none", "predictor", "token", "truth"):
        row = OwnRow(
            bed,
            store,
            "lru",
            slots=3,
            predictor=favourites,
            prefetch_by=prefetch_by,
            prefetch=options,
        )
        said[prefetch_by], _ = decode(row)
        traffic[prefetch_by] = row.traffic()
    assert all(one == said["none"] for one in said.values())
    assert traffic["token"] == traffic["predictor"], "who has learned nothing of next layers"
    assert traffic["none"].prefetched_bytes == 0 < traffic["predictor"].prefetched_bytes
    assert traffic["truth"].missed_bytes < traffic["none"].missed_bytes
    assert traffic["truth"].wasted_bytes == 0
    if into == "slots":
        assert traffic["truth"].missed_bytes == 0
        assert traffic["truth"].hits == traffic["none"].accesses
    with pytest.raises(ValueError, match="prefetch_by='predictor': name a predictor"):
        OwnRow(bed, store, "lru", slots=3, prefetch_by="predictor")


class Favourites:
    """Says of every token how often all tokens use each expert."""

    kind = "favourites"
    next_layers = None

    def __init__(self, ids_NLK: Tensor, num_experts: int) -> None:
        used_NLE = torch.zeros(*ids_NLK.shape[:2], num_experts).scatter_(2, ids_NLK, 1.0)
        self._use_LE = used_NLE.mean(0)

    def graph_module(self, *, batch_size: int) -> "FavouritesGraph":
        return FavouritesGraph(self._use_LE)


class FavouritesGraph(GraphPredictor):
    def __init__(self, use_LE: Tensor) -> None:
        super().__init__()
        self.register_buffer("next_LE", use_LE)
        self.register_buffer("forecast_LE", 2 * use_LE)

    def begin(self) -> None: ...

    def on_token(
        self, expert_map_BLE: Tensor | None, token_ids_B: Tensor, next_token_ids_B: Tensor
    ) -> None: ...

    def on_routed(
        self,
        layer: int,
        topk_expert_ids_BK: Tensor,
        topk_probs_BK: Tensor,
        out_E: Tensor | None = None,
    ) -> Tensor:
        return self.next_LE[layer]


def trace_of(route: Route, part: slice, name: str) -> Trace:
    """A part of a route as a recorded request."""
    return Trace(
        request_id=name,
        source="drawn",
        topic="",
        topk_expert_ids_TLK=route.ids_NLK[part].numpy().astype(np.uint8),
        topk_probs_TLK=route.weights_NLK[part].numpy().astype(np.float16),
        num_prompt_tokens=0,
        first_routed_position=0,
    )


def test_two_matrix_products_are_the_expert(bed: ReplayTestbed) -> None:
    layout, experts = bed.layout, bed.layers[0].experts
    torch.manual_seed(1)
    hidden_TD = torch.randn(3, layout.hidden_size)
    record_P = bed.block_EP[0]
    block_FRD = layout.block_FRD(record_P)
    rows_FUD = block_FRD[:, :-1]  # gate and up of each neuron
    up_first = rows_FUD.transpose(0, 1) if layout.is_concatenated else rows_FUD
    parts = [up_first.reshape(-1), block_FRD[:, -1].T.reshape(-1)]
    if layout.has_bias:
        bias_FU = layout.up_bias_FU(record_P)
        up_bias = bias_FU.T if layout.is_concatenated else bias_FU
        parts += [up_bias.reshape(-1), layout.down_bias_D(record_P)]
    ours_TD = matrix_expert(experts, layout, torch.cat(parts), hidden_TD)
    torch.testing.assert_close(ours_TD, expert_forward(experts, layout, record_P, hidden_TD))


def test_efficiency_is_measured_against_compute_and_against_the_link() -> None:
    samples = Samples(
        step_s=[[0.01, 0.03], [0.02, 0.02]],
        traffic=[Traffic(accesses=8, hits=6, missed_bytes=200), Traffic(accesses=8, hits=8)],
        exact=True,
    )
    row = summary("r", 2, samples, resident_step_s=0.01, link_bytes_per_s=1e4)
    assert row["missed_bytes_per_token"] == 50
    assert row["efficiency"] == pytest.approx(0.5)  # compute takes 10 ms, the bytes 5
    assert row["resident_speed_fraction"] == pytest.approx(0.5)
    assert row["stall_s_per_token"] == pytest.approx(0.01)
    assert row["hit_ratio"] == 14 / 16
    row = summary("r", 2, samples, resident_step_s=0.01, link_bytes_per_s=2.5e3)
    assert row["efficiency"] == pytest.approx(1.0)  # the bytes take all of the 20 ms
    assert "14" not in text_table([row]).splitlines()[0]
    row = summary(
        "r", 2, samples, resident_step_s=0.001, link_bytes_per_s=2.5e3, cpu_bytes_per_s=2.5e3
    )
    assert row["efficiency"] == pytest.approx(0.5)  # two lanes could do it in 10 ms


def test_what_was_prefetched_counts_as_needed_as_far_as_it_was_used() -> None:
    traffic = Traffic(
        accesses=8,
        hits=6,
        missed_bytes=200,
        cpu_bytes=60,
        prefetched_bytes=120,
        wasted_bytes=80,
    )
    samples = Samples(step_s=[[0.02]], traffic=[traffic])
    row = summary("r", 2, samples, resident_step_s=0.001, link_bytes_per_s=2e4)
    assert row["efficiency"] == pytest.approx(0.6)  # 240 bytes take 12 of the 20 ms
    assert row["link_use"] == pytest.approx(0.65)  # and it carried 260


def test_a_percentile_is_a_measured_value() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([3.0], 0.99) == 3.0


def test_the_readme_table_shows_each_row_and_what_was_not_run() -> None:
    row = summary(
        "ours, lru",
        8,
        Samples(step_s=[[0.02]], traffic=[Traffic(accesses=4, hits=3, missed_bytes=50_000_000)]),
        resident_step_s=0.01,
        link_bytes_per_s=5e9,
    )
    result = {
        "rows": [row | {"residency": 0.25}],
        "link_bytes_per_s": {"copy engine": {"median": 5e9}},
        "hardware": {"gpus": [{"name": "Some GPU"}]},
        "options": {"repeats": 1, "tokens": 1},
        "skipped": {"torch.compile": "compile=true"},
        "model": "a model",
        "circumstances": {"command": "c", "hardware": "h", "commit": "0123456789ab"},
    }
    text = readme._decode(result)
    assert "| 25 % | ours, lru | 20.00 (20.00) | 0.50 | 75.0 % | 50 | 0.50 |" in text
    assert "torch.compile: not run, compile=true." in text


def test_lists_and_words_become_options() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Schema:
        shares: tuple[float, ...] = (0.5,)
        names: tuple[str, ...] = ()
        on: bool = False

    assert parse_options(Schema, ["shares=.25,1", "names=[a,b]", "on=true"]) == Schema(
        shares=(0.25, 1.0), names=("a", "b"), on=True
    )
    with pytest.raises(ValueError, match="shares=x: expected float"):
        parse_options(Schema, ["shares=x"])
    with pytest.raises(ValueError, match="on is given twice"):
        parse_options(Schema, ["on=true", "on=false"])


def test_a_trained_model_is_the_same_to_the_bit_at_every_residency() -> None:
    result = live_testbed.measure_live(
        str(TINY_MOE_DIR),
        device=torch.device("cpu"),
        dtype="float32",
        residencies=[0.25],
        policies=["lru", "lfru"],
        repeats=1,
        tokens=4,
    )
    stock, resident, *fewer = result["rows"]
    assert [row["row"] for row in fewer] == ["attached, lru", "attached, lfru"]
    assert all(row["exact"] and row["finite"] for row in [resident, *fewer])
    assert all(row["same_tokens"] == row["tokens"] for row in [resident, *fewer])
    assert all(0 < row["hit_ratio"] < 1 and row["miss_bytes"] > 0 for row in fewer)
    assert stock["median_margin"] > 0
    json.dumps(result)


def test_a_run_measures_every_row_and_the_file_holds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every path of the benchmark but torch.compile, accelerate and CUDA itself."""
    out = tmp_path / "out.json"
    benchmark.main(
        [
            *("shape=gptoss20b", "small=true", "dtype=float32", f"device={KERNEL_DEVICE}"),
            *("residencies=.5", "policies=lru,belady", "repeats=2", "tokens=4", "accelerate=false"),
            f"out={out}",
        ]
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads(out.read_text())
    assert told["complete"]
    assert told["failed"] == {}
    assert set(told["skipped"]) == {"torch.compile", "accelerate cpu_offload"}
    assert all(rate["median"] > 0 for rate in told["link_bytes_per_s"].values())
    rows = {(row["row"], row["residency"]): row for row in told["rows"]}
    assert len(rows) == len(told["rows"]) == 9
    own = [row for (name, _), row in rows.items() if name.startswith("ours")]
    assert all(row["exact"] and row["finite"] for row in own)
    for name in ("eager", "grouped_mm"):
        assert rows[f"eager, stock {name}", 1.0]["logits_difference"] < 1e-4
    for residency in (0.5, 1.0):
        resident = rows["ours, all resident", residency]
        assert (resident["hit_ratio"], resident["missed_bytes_per_token"]) == (1.0, 0.0)
    ours, theirs = rows["ours, lru", 0.5], rows["on-demand LRU, host synchronisation", 0.5]
    for key in ("hit_ratio", "missed_bytes_per_token", "tokens"):
        assert ours[key] == theirs[key]
    assert 0 < ours["hit_ratio"] <= rows["ours, belady", 0.5]["hit_ratio"] < 1
    told_next = rows["ours, lru + perfect next layers (bound)", 0.5]
    assert told_next["hit_ratio"] == ours["hit_ratio"], "what lands displaces nothing"
    saved = ours["missed_bytes_per_token"] - told_next["missed_bytes_per_token"]
    came_true = told_next["prefetched_bytes_per_token"] - told_next["wasted_bytes_per_token"]
    assert saved == pytest.approx(came_true)
    assert saved > 0


def test_a_row_that_fails_is_told_and_the_others_go_on() -> None:
    bed = ReplayTestbed(
        SHAPES["qwen3_30b"].small(), device=torch.device("cpu"), num_tokens=4, dtype=torch.float32
    )
    timer = Timer(bed, repeats=2, tokens=4)
    with torch.no_grad():
        samples = timer.time([StockRow(bed, "eager"), StockRow(bed, "does_not_exist")])
    assert list(samples) == ["eager, stock eager"]
    assert len(samples["eager, stock eager"].step_s) == 2
    assert "does_not_exist" in timer.failed["eager, stock does_not_exist"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shape=gpt5", "shape=gpt5: must be one of gptoss20b"),
        ("residencies=.5,1.5", "must be shares in"),
        ("tokens=4000", "tokens=4000: must be in 4..128"),
        ("dtype=int4", "dtype=int4: must be one of bfloat16"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(argument: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        benchmark.main(["small=true", f"device={KERNEL_DEVICE}", argument])
