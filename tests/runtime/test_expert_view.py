"""A view shows what the cache holds, counts each use once, and costs nothing while nobody looks."""

from typing import Any

import pytest
import torch

from data.adapters import moe_layers, router_probs_TE, spec_of
from runtime.engine import attach
from runtime.expert_view import ExpertView, slot_recall
from runtime.offload import Offload
from runtime.policies import make_policy
from tests.fakes import Previous
from tests.families import tiny_model

PROMPT_IDS = [[3, 1, 4, 1, 5]]


@pytest.fixture
def offload() -> Any:
    model = tiny_model("qwen3_moe")
    predictor = Previous()
    predictor.load_state(spec_of(model), {})
    with attach(
        model, policy="forecast", slots=4, predictor=predictor, record_events=True
    ) as attached:
        attached.model = model
        yield attached


def generate(offload: Any, num_tokens: int = 5) -> None:
    offload.model.generate(
        torch.tensor(PROMPT_IDS),
        attention_mask=torch.ones(1, len(PROMPT_IDS[0]), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )


def counts_of(offload: Offload, kinds: set[str], start: int = 0) -> torch.Tensor:
    counts_LE = torch.zeros(offload.spec.num_layers, offload.spec.num_experts, dtype=torch.int64)
    for event in offload.events[start:]:
        if event.kind in kinds:
            counts_LE[event.layer, event.expert] += 1
    return counts_LE


def test_uses_are_counted_from_the_first_look_and_once(offload: Any) -> None:
    generate(offload)
    first = offload.view()
    assert first.hits_LE is not None
    assert int(first.hits_LE.sum()) == 0  # nobody looked while those tokens were served
    start = len(offload.events)
    generate(offload)
    second = offload.view()
    assert torch.equal(second.hits_LE, counts_of(offload, {"hit"}, start))
    assert torch.equal(second.misses_LE, counts_of(offload, {"miss"}, start))
    assert min(int(second.hits_LE.sum()), int(second.misses_LE.sum())) > 0
    assert int(offload.view().hits_LE.sum()) == 0


def test_nothing_is_counted_after_the_last_look(offload: Any) -> None:
    offload.view(goes_on=False)
    generate(offload)
    assert int(offload.view().misses_LE.sum()) == 0


def test_a_view_stays_as_it_was_taken(offload: Any) -> None:
    generate(offload)
    view = offload.view()
    resident_LE, expected_LE = view.resident_LE.clone(), view.expected_LE.clone()
    assert resident_LE.sum(-1).tolist() == [4] * offload.spec.num_layers
    offload.model.generate(torch.tensor([[9, 8, 7, 6]]), max_new_tokens=8, do_sample=False)
    later = offload.view()
    assert not torch.equal(later.resident_LE, resident_LE)
    assert torch.equal(view.resident_LE, resident_LE)
    assert torch.equal(view.expected_LE, expected_LE)


def test_no_forecast_is_shown_where_the_policy_reads_none(offload: Any) -> None:
    assert offload.view().expected_LE is not None
    offload._backend.use_policy(make_policy("lru"))
    assert offload.view().expected_LE is None


def test_the_k_expected_most_are_marked_and_never_those_expected_at_all_not() -> None:
    expected_LE = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.0, 0.0, 0.3, 0.0]])
    view = ExpertView(resident_LE=torch.zeros(2, 4, dtype=torch.bool), expected_LE=expected_LE)
    assert view.most_expected_LE(2).tolist() == [
        [False, True, True, False],
        [False, False, True, False],
    ]
    nothing = ExpertView(resident_LE=torch.zeros(2, 4, dtype=torch.bool), expected_LE=None)
    assert not nothing.most_expected_LE(2).any()


def test_slot_recall_counts_used_experts_among_the_k_forecast_highest() -> None:
    probs_LE = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])
    next_LE = torch.tensor([[0.9, 0.1, 0.8, 0.0], [0.5, 0.0, 0.1, 0.4], [0.0, 0.0, 0.0, 0.0]])
    # Layer 0 used {0, 1}, guessed {0, 2}; layer 1 {0, 3}, {0, 3}; of layer 2 nothing was said.
    assert slot_recall(probs_LE, next_LE, 2) == (1 + 2, 4)


def test_recall_of_decoded_tokens_is_that_of_their_routing(offload: Any) -> None:
    """Who expects the last token's routing again is right as often as two neighbours agree."""
    layers, maps = offload.spec.num_layers, []
    handles = [
        moe.router.register_forward_hook(
            lambda _, args, output, moe=moe: maps.append(router_probs_TE(moe, output[0]))
        )
        for moe in moe_layers(offload.model)
    ]
    generate(offload, num_tokens=6)
    for handle in handles:
        handle.remove()
    generate(offload, num_tokens=1)  # only then the last pass is looked at
    passes = [maps[i : i + layers] for i in range(0, len(maps), layers)]
    assert len(passes) == 6  # the prompt, and five tokens
    top_k, found, used = offload.spec.top_k, 0, 0
    for before, now in zip(passes, passes[1:], strict=False):
        for before_TE, now_TE in zip(before, now, strict=True):
            guess = set(before_TE[-1].topk(top_k).indices.tolist())
            found += len(guess & set(now_TE[-1].topk(top_k).indices.tolist()))
            used += top_k
    stats = offload.stats()
    assert (stats.foreseen_experts, stats.judged_experts) == (found, used)
    assert 0 < found < used


def test_recall_is_not_told_without_a_predictor() -> None:
    with attach(tiny_model("qwen3_moe"), policy="lru", slots=4) as offload:
        stats = offload.stats()
    assert (stats.foreseen_experts, stats.judged_experts) == (None, None)
