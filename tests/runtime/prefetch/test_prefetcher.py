"""Prefetching between layers: the same bits, fewer misses, nothing lost that is worth more."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetch_bench import NEURONS, Scripted, experts, options, serve

from data.adapters import moe_layers, spec_of
from data.routers import Routers
from runtime.cache import ExpertCache
from runtime.decode_graph import DecodeGraph, recorder_for
from runtime.device_cache import COUNTERS
from runtime.engine import Offload
from runtime.gpu_experts import GpuExperts
from runtime.policies import make_policy
from runtime.prefetch.prefetcher import Prefetcher
from runtime.prefetch.sources import NextRouters, Now
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model


def random_routing(num_tokens: int, *, seed: int = 0) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, 3, 8, generator=generator).topk(2).indices.tolist()


def counted(backend: GpuExperts) -> dict[str, int]:
    totals = backend.cache.counters_LX.sum(0).tolist()
    return dict(zip(COUNTERS, totals, strict=True))


@pytest.mark.parametrize(("policy", "neurons"), [("lru", 64), ("lfru", 4 * NEURONS)])
def test_prefetching_changes_no_bit_and_saves_what_it_brings(policy: str, neurons: int) -> None:
    source = Scripted(3, 8)
    plain = experts(source=None, policy=policy)
    fetching = experts(source=source, policy=policy, prefetch=options(neurons=neurons))
    noise = torch.Generator().manual_seed(1)
    for ids_LK in random_routing(5):
        for layer, ids_K in enumerate(ids_LK):  # right mostly, and sometimes wrong
            source.say(layer, ids_K, 0.9)
            source.next_LE[layer, torch.randint(8, (1,), generator=noise)] = 0.4
        assert torch.equal(serve(fetching, ids_LK), serve(plain, ids_LK))
        fetching.cache.check_integrity()
    with_it, without = counted(fetching), counted(plain)
    assert with_it["missed_neurons"] < without["missed_neurons"]
    assert with_it["used_neurons"] > 0
    assert fetching.stats().prefetched_bytes == with_it["prefetched_neurons"] * 3 * 32 * 4
    if neurons >= NEURONS * 2:
        assert with_it["misses"] == 0, "every layer was told the truth in time"


def test_slots_hold_what_the_books_call_present() -> None:
    source = Scripted(3, 8)
    backend = experts(source=source, prefetch=options(neurons=64))
    for ids_LK in random_routing(3, seed=3):
        for layer in range(3):
            source.say(layer, ids_LK[layer][:1])
        serve(backend, ids_LK)
        for layer in range(3):
            for expert, slot in enumerate(backend.cache.cache.slot_of_LE[layer].tolist()):
                elements = int(backend.cache.present_LE[layer, expert]) * 3 * 32
                slot_P = backend._division.slots_LCP[layer][slot][:elements].cpu()
                assert torch.equal(slot_P, backend._store.record_P(layer, expert)[:elements])


def test_a_pass_keeps_the_books_of_the_simulators_cache() -> None:
    """Step and prefetch in turn, whole experts."""
    source = Scripted(3, 8)
    backend = experts(source=source, prefetch=options(neurons=NEURONS * 4, layers_ahead=1))
    plain = ExpertCache(
        make_policy("lru"), num_layers=3, num_experts=8, slots=4, with_prefetch=True
    )
    generator = torch.Generator().manual_seed(5)
    for ids_LK in random_routing(6, seed=5):
        source.next_LE.copy_(torch.rand(3, 8, generator=generator))
        serve(backend, ids_LK)
        for layer, ids_K in enumerate(ids_LK):
            next_E = source.next_LE[layer].cpu()
            usage = plain.layer_usage(layer)
            # As at the event that is to come, one step after the last.
            score_E = (usage.last_use_LE - usage.step_L1 - 1).float()
            plain.prefetch(
                next_E >= 1 / 3,
                next_E,
                layer=layer,
                margin=0.1,
                max_fetches=4,
                victims_by_LE=score_E,
            )
            needed_E = torch.zeros(8, dtype=torch.bool)
            needed_E[ids_K] = True
            plain.step(needed_E, layer=layer)
        assert torch.equal(backend.cache.cache.slot_of_LE.cpu(), plain.slot_of_LE)
        assert torch.equal(backend.cache.cache.prefetched_LE.cpu(), plain.prefetched_LE)
    assert counted(backend)["wasted"] > 0


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_nothing_goes_that_every_newcomer_does_not_beat(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31))
    source = Scripted(3, 8)
    margin = data.draw(st.sampled_from([0.0, 0.1, 0.4]))
    allowance = data.draw(st.sampled_from([0, 64, 128, 512]))
    backend = experts(
        source=source, prefetch=options(neurons=allowance, margin=margin, layers_ahead=3)
    )
    prefetcher, cache = backend.prefetcher, backend.cache
    assert prefetcher is not None
    generator = torch.Generator().manual_seed(seed)
    is_off = torch.rand(3, generator=generator) < 0.3
    prefetcher.review.least_L.masked_fill_(is_off.to(KERNEL_DEVICE), math.inf)
    for ids_LK in random_routing(3, seed=seed):
        cache.advance()
        for layer, ids_K in enumerate(ids_LK):
            cache.step(layer, torch.tensor([ids_K], device=KERNEL_DEVICE))
    source.next_LE.copy_(torch.rand(3, 8, generator=generator))
    cache.advance()
    resident_LE = cache.cache.usage.resident_LE.clone()
    present_LE = cache.present_LE.clone()
    score_LE = cache.keep_LE.clone()
    prefetcher.fetch_after(Now(-1, 1))
    came_LE = cache.cache.usage.resident_LE & ~resident_LE
    gone_LE = resident_LE & ~cache.cache.usage.resident_LE
    grown = (cache.present_LE - present_LE).clamp(min=0).sum()
    assert int(grown) <= allowance
    for layer in range(3):
        next_E, came_E, gone_E = source.next_LE[layer], came_LE[layer], gone_LE[layer]
        if is_off[layer]:
            assert not came_E.any()
        if came_E.any():
            assert next_E[came_E].min() >= prefetcher.review.least_L[layer]
        if gone_E.any():
            bar = next_E[came_E].min()
            assert next_E[gone_E].max() + margin < bar
            stays_E = resident_LE[layer] & ~gone_E & (next_E + margin < bar)
            if stays_E.any():
                assert score_LE[layer, gone_E].max() <= score_LE[layer, stays_E].min()
    cache.check_integrity()


def test_what_the_next_layer_leaves_of_the_allowance_is_the_one_behinds() -> None:
    source = Scripted(3, 8)
    backend = experts(source=source, slots=6, prefetch=options(neurons=NEURONS + 64))
    source.say(0, [3])
    source.say(1, [5, 6])
    backend.begin_pass(1)
    assert source.asked == [(-1, 0), (-1, 1)]
    assert backend.cache.present_LE[0].tolist() == [0, 0, 0, NEURONS, 0, 0, 0, 0]
    assert backend.cache.present_LE[1].tolist() == [0, 0, 0, 0, 0, 64, 0, 0]
    serve(backend, [[3, 0], [5, 6], [1, 2]], begins=False)
    assert source.asked[2:] == [(0, 1), (0, 2), (1, 2)]
    assert counted(backend)["missed_neurons"] == NEURONS + 0 + 2 * NEURONS  # 0; none; 1 and 2


def test_where_it_loses_it_switches_itself_off_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four experts in turn that fit; the source names the other four, layer 1's tells the truth."""
    source = Scripted(3, 8)
    backend = experts(source=source, prefetch=options(neurons=4 * NEURONS, review_tokens=4))
    turns = [[0, 1], [2, 3]]
    for token in range(16):
        ids_K = turns[token % 2]
        for layer in (0, 2):
            source.say(layer, [4, 5] if token % 4 < 2 else [6, 7])
        source.say(1, ids_K)
        serve(backend, [ids_K] * 3)
    assert backend.prefetcher.review.layers_off == {0, 2}
    assert backend.stats().prefetch_layers_off == 2
    assert backend.stats().wasted_bytes > 0
    assert [record for record in caplog.records if "loses in layers [0, 2]" in record.message]
    before = backend.cache.counters_LX.clone()
    for token in range(4):
        serve(backend, [turns[token % 2]] * 3)
    since = dict(zip(COUNTERS, (backend.cache.counters_LX - before).T.tolist(), strict=True))
    assert since["prefetched"] == [0, 0, 0]
    assert since["hits"] == [8, 8, 8], "as if nobody had ever prefetched"
    backend.reset()
    assert backend.prefetcher.review.layers_off == set()
    assert not backend.prefetcher.review._judged_LX.any(), "counters begin at 0 again"
    assert backend.prefetcher.review.least_L.isfinite().all()


def test_a_prompt_in_between_joins_what_is_under_way() -> None:
    source = Scripted(3, 8)
    plain, fetching = experts(source=None), experts(source=source)
    source.say(0, [3])
    fetching.begin_pass(1)  # broken off
    hidden_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE)
    ids_TK = torch.arange(80).view(40, 2).remainder(8).to(KERNEL_DEVICE)
    weights_TK = torch.full((40, 2), 0.5, device=KERNEL_DEVICE)
    for layer in range(3):
        said = [b.forward(layer, hidden_TD, ids_TK, weights_TK) for b in (plain, fetching)]
        assert torch.equal(*said)
    fetching.cache.check_integrity()


def test_nothing_is_prefetched_where_all_is_resident_or_home_cannot_be_read() -> None:
    assert experts(source=Scripted(3, 8), slots=8).prefetcher is None
    assert experts(source=None).prefetcher is None


def served_by(model: Any) -> GpuExperts:
    layers, spec = moe_layers(model), spec_of(model)
    return GpuExperts.build(
        model=model,
        layers=layers,
        spec=spec,
        slots=(4,) * spec.num_layers,
        policy=make_policy("lru"),
        device=torch.device(KERNEL_DEVICE),
        prefetch_by=Scripted(spec.num_layers, spec.num_experts),
        prefetch=options(),
    )


def test_a_pass_begins_whether_the_embedding_is_called_by_name_or_by_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = tiny_model("mixtral", intermediate_size=NEURONS)
    backend = served_by(model)
    begun: list[int] = []
    monkeypatch.setattr(backend, "begin_pass", begun.append)
    embed, ids_1T = model.get_input_embeddings(), torch.tensor([[1, 2, 3]], device=KERNEL_DEVICE)
    assert torch.equal(embed(ids_1T), embed(input=ids_1T))
    assert begun == [3, 3]
    backend.restore()


def test_a_pass_that_broke_off_before_layer_0_takes_no_step_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next is given embeddings, so that only the model's own hook says that it begins."""
    model: Any = tiny_model("mixtral", intermediate_size=NEURONS)
    backend = served_by(model)
    advance, advanced = backend._advance, []
    monkeypatch.setattr(backend, "_advance", lambda: (advanced.append(True), advance()))
    embed, ids_11 = model.get_input_embeddings(), torch.tensor([[1]], device=KERNEL_DEVICE)
    layers, spec = moe_layers(model), spec_of(model)
    with Offload(
        layers=layers, spec=spec, slots=(4,) * spec.num_layers, backend=backend
    ) as offload:
        offload._install()
        with torch.no_grad():
            embeds_11D = embed(ids_11)  # as in a pass whose attention then raises
            assert len(advanced) == 1
            model(inputs_embeds=embeds_11D)
        assert len(advanced) == 2


@pytest.mark.parametrize("layer", [None, 1])
def test_who_writes_what_is_expected_waits_for_who_reads_it(
    layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = experts(source=Scripted(3, 8))
    assert backend.prefetcher is not None
    joined: list[bool] = []
    monkeypatch.setattr(backend.prefetcher, "join_decision", lambda: joined.append(True))
    assert backend.later_use(layer).shape == ((3, 8) if layer is None else (8,))
    assert joined == [True]


@pytest.mark.parametrize(
    ("family", "into"), [("qwen3_moe", "slots"), ("gpt_oss", "landing"), ("deepseek_v3", "landing")]
)
def test_generating_with_the_next_routers_says_the_same(family: str, into: str) -> None:
    """Through the hooks of the model, recorded steps and all."""
    sizes = {"moe_intermediate_size": 64} if family != "gpt_oss" else {"intermediate_size": 128}
    model = tiny_model(family, **sizes)
    layers, spec = moe_layers(model), spec_of(model)
    prompt_BT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])

    def generate() -> list[int]:
        ids_BT = prompt_BT.to(model.device)
        said = model.generate(
            ids_BT, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
        return said[0].tolist()

    stock = generate()
    backend = GpuExperts.build(
        model=model,
        layers=layers,
        spec=spec,
        slots=(6,) * spec.num_layers,
        policy=make_policy("lru"),
        device=torch.device(KERNEL_DEVICE),
        prefetch_by=NextRouters(Routers(model), top_k=spec.top_k, lookahead=2),
        prefetch=options(neurons=4 * NEURONS, review_tokens=2, into=into, landing_records=2),
    )
    assert isinstance(backend.prefetcher, Prefetcher)
    with Offload(
        layers=layers, spec=spec, slots=(6,) * spec.num_layers, backend=backend
    ) as offload:
        offload._install()
        offload._graph = DecodeGraph(model, recorder=recorder_for(model), max_batch=4)
        assert generate() == stock
        stats = offload.stats()
        assert stats.graph_replays > 0
        assert stats.prefetched_bytes > 0
        assert counted(backend)["used_neurons"] > 0
        backend.cache.check_integrity()
    assert not model._forward_hooks, "detached, nobody listens"
    assert generate() == stock
