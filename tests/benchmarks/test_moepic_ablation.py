"""The ablation's parts: guesses as good as they say, divisions of equal memory, and its clock."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import moepic_ablation
from benchmarks.guessed_routing import random_scores, recalled_scores
from benchmarks.moepic_ablation import Options, equal, small
from benchmarks.overlap import overlap
from benchmarks.replay_shapes import SHAPES
from benchmarks.replay_testbed import ReplayTestbed, filled_store
from runtime.split_budget import SplitStatistics, SplitTimes
from tests.devices import INTERPRETED

E, K = 16, 4


def drawn(num_tokens: int, num_layers: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num_tokens, num_layers, E, generator=generator).topk(K).indices


@pytest.mark.parametrize("recall", [0.0, 0.82, 1.0])
def test_a_guess_names_k_experts_and_is_right_as_often_as_it_says(recall: float) -> None:
    ids_NLK = drawn(2000)
    scores_NLE = recalled_scores(ids_NLK, E, recall=recall)
    assert ((scores_NLE[:, 1:] > 0).sum(-1) == K).all()
    right_NLK = (scores_NLE.gather(2, ids_NLK) > 0).float()
    assert float(right_NLK[:, 1:].mean()) == pytest.approx(recall, abs=0.01)
    used_NLE = torch.zeros_like(scores_NLE).scatter_(2, ids_NLK, 1.0)
    assert torch.equal(scores_NLE[1:, 0], used_NLE[:-1, 0]), "layer 0 knows the token before"
    assert not scores_NLE[0, 0].any()
    assert torch.equal(scores_NLE, recalled_scores(ids_NLK, E, recall=recall))
    with pytest.raises(ValueError, match="recall=1.5"):
        recalled_scores(ids_NLK, E, recall=1.5)


def test_a_random_order_finds_what_chance_finds() -> None:
    ids_NLK = drawn(2000)
    best_NLK = random_scores(2000, 3, E, seed=1).topk(K).indices
    found = (best_NLK[..., None] == ids_NLK[..., None, :]).any(-1).float().mean()
    assert float(found) == pytest.approx(K / E, abs=0.02)


@pytest.mark.parametrize(
    ("share", "cached"), [(0.5, [7, 7]), (1.0, [4, 3]), (0.25, [8, 8]), (2 / 3, [5, 5])]
)
def test_equal_divisions_use_the_memory_and_no_more(share: float, cached: list[int]) -> None:
    statistics = SplitStatistics(num_layers=2, num_experts=8, top_k=2)
    for layer in range(2):
        used_E = torch.arange(8).lt(2).numpy()
        scores_E = torch.arange(8).double().numpy()
        statistics.add(layer, priority_E=scores_E, used_E=used_E, said_E=scores_E)
    times = SplitTimes(attention_s=1e-4, moe_s=1e-4, head_s=1e-4, load_s=1e-3)
    plan = equal(7.0, statistics.layers(), times, share=share)
    assert plan.cached_L.tolist() == cached
    assert plan.share_L.tolist() == pytest.approx([share] * 2)
    assert plan.memory_L.sum() <= 7.0


def test_options_out_of_range_are_refused_by_name() -> None:
    for changed, message in (
        ({"shape": "x"}, "shape=x"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"counted": 0}, "counted=0"),
        ({"residency": 1.0}, "residency=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**changed)


@pytest.mark.slow
def test_the_command_measures_every_row_and_no_logit_differs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["small=true", "tokens=4", "repeats=1", "counted=20", "dtype=float32"]
    moepic_ablation.main([*words, "residency=.5"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(told["rows"]) == 8
    assert all(row["exact"] for row in told["rows"])
    none, full = (
        next(row for row in told["rows"] if row["row"] == name)
        for name in ("full, no prefetch", "full")
    )
    assert none["prefetched_bytes_per_token"] == 0 < full["prefetched_bytes_per_token"]
    assert full["missed_bytes_per_token"] < none["missed_bytes_per_token"]


@pytest.mark.gpu
def test_tops_are_computed_while_bottoms_arrive() -> None:
    assert not INTERPRETED
    config = {
        **small(SHAPES["gptoss20b"]).config,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_experts_per_tok": 4,
    }
    shape = replace(small(SHAPES["gptoss20b"]), config=config)
    bed = ReplayTestbed(shape, device=torch.device("cuda"), num_tokens=4, dtype=torch.bfloat16)
    store = filled_store(bed.layout, bed.num_layers, bed.block_EP)
    torch.cuda.synchronize()
    shown = overlap(bed, store, slot_neurons=1408)
    store.close()
    assert shown["bottoms_began_s"] < shown["tops_done_s"] < shown["bottoms_done_s"]
    assert shown["share_of_tops_within_bottoms"] > 0.5
    # Half of the experts takes half as long over the link, and the tops next to nothing more.
    assert shown["bottoms_done_s"] < 0.65 * shown["all_at_home_s"]
