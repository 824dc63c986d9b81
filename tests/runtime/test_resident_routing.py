"""The lossy mode: nothing but resident experts is used, nothing is loaded, and nothing hides it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from data.observe import RouterRecorder
from predictors.popularity import Popularity
from runtime.attach_checks import check_mode
from runtime.engine import attach
from runtime.resident_routing import most_wanted
from tests.families import tiny_model

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SLOTS = 5


def scores(model: Any, seed: int = 0) -> Tensor:
    spec = spec_of(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(spec.num_layers, spec.num_experts, generator=generator)


def generate(model: Any) -> Tensor:
    answer: Tensor = model.generate(
        PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return answer


@torch.no_grad()
def logits(model: Any) -> Tensor:
    said: Tensor = model(PROMPT).logits
    return said


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_each_token_gets_the_best_resident_experts_with_the_models_own_weights(
    family: str,
) -> None:
    model = tiny_model(family)
    before = logits(model)
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    with attach(
        model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model)
    ) as offload:
        resident_LE = most_wanted(scores(model), offload.slots)
        handles = [
            moe.router.register_forward_hook(lambda _, __, output: given.append(output))
            for moe in moe_layers(model)
        ]
        restricted = logits(model)
        for handle in handles:
            handle.remove()
        stats = offload.stats()
    assert not torch.equal(restricted, before)
    assert len(given) == len(resident_LE)
    own_top_k, is_normalised = spec_of(model).top_k, family != "olmoe"
    rerouted = 0
    for (router_logits, weights_TK, ids_TK), resident_E in zip(given, resident_LE, strict=True):
        masked_TE = router_logits.float().masked_fill(~resident_E, -torch.inf).softmax(-1)
        expected_TK, expected_ids_TK = masked_TE.topk(own_top_k)
        if is_normalised:
            expected_TK = expected_TK / expected_TK.sum(-1, keepdim=True)
        assert resident_E[ids_TK].all()
        assert torch.equal(ids_TK.sort().values, expected_ids_TK.sort().values)
        torch.testing.assert_close(weights_TK.float(), expected_TK, rtol=1e-5, atol=1e-6)
        rerouted += int((~resident_E[router_logits.topk(own_top_k).indices]).sum())
    assert (stats.routed, stats.rerouted) == (sum(i.numel() for *_, i in given), rerouted)
    assert rerouted > 0


def test_with_all_experts_resident_nothing_differs_by_a_bit() -> None:
    model = tiny_model("qwen3_moe")
    with attach(model, slots=16) as offload:
        exact, answer = logits(model), generate(model)
        assert offload.stats().mode == "lossless"
    with attach(model, mode="resident_only", slots=16, resident_scores_LE=scores(model)) as offload:
        assert torch.equal(logits(model), exact)
        assert torch.equal(generate(model), answer)
        assert offload.stats().rerouted == 0


def test_no_forward_pass_loads_anything_and_only_what_changes_is_moved() -> None:
    model = tiny_model("qwen3_moe")
    num_layers = spec_of(model).num_layers
    first_LE = torch.zeros(num_layers, 16)
    first_LE[:, [1, 3, 5, 7, 9]] = 1.0
    second_LE = torch.zeros(num_layers, 16)
    second_LE[:, [1, 3, 5, 8, 10]] = 1.0
    with attach(
        model, mode="resident_only", slots=SLOTS, resident_scores_LE=first_LE, record_events=True
    ) as offload:
        assert offload.stats().moved == SLOTS * num_layers
        generate(model)
        stats = offload.stats()
        assert stats.hits > 0
        assert (stats.misses, stats.streamed, stats.miss_bytes) == (0, 0, 0)
        assert stats.moved == SLOTS * num_layers
        offload.keep_resident(second_LE)
        generate(model)
        stats = offload.stats()
        assert (stats.misses, stats.moved) == (0, (SLOTS + 2) * num_layers)
        evicted = {event.expert for event in offload.events if event.kind == "evict"}
        assert evicted == {7, 9}


def test_experts_that_come_in_are_computed_as_themselves() -> None:
    """After a change of residents the model says what it says if they had been there at once."""
    model = tiny_model("qwen3_moe")
    with attach(model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model, 1)):
        direct = logits(model)
    with attach(
        model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model, 0)
    ) as offload:
        assert not torch.equal(logits(model), direct)
        offload.keep_resident(scores(model, 1))
        assert torch.equal(logits(model), direct)


def test_detaching_gives_the_model_back_and_its_routers_their_choice() -> None:
    model = tiny_model("qwen3_moe")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    offload = attach(model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model))
    logits(model)
    offload.detach()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert not any(moe.router._forward_hooks for moe in moe_layers(model))
    assert offload.stats().mode == "resident_only"


def test_the_mode_names_itself_in_the_log_and_is_off_by_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("qwen3_moe")
    with attach(model, slots=SLOTS) as offload:
        with pytest.raises(ValueError, match="lossless"):
            offload.keep_resident(scores(model))
    assert "LOSSY" not in caplog.text
    with attach(model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model)):
        assert "resident_only" in caplog.text
        assert "LOSSY" in caplog.text


def test_routing_is_recorded_as_it_happened() -> None:
    model = tiny_model("qwen3_moe")
    with (
        attach(model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model)),
        RouterRecorder(model, keep_router_probs=False) as tap,
    ):
        logits(model)
        ids_NLK = tap.take().ids_NLK.long()
    resident_LE = most_wanted(scores(model), [SLOTS] * ids_NLK.shape[1])
    for layer, resident_E in enumerate(resident_LE):
        assert resident_E[ids_NLK[:, layer]].all()


def test_of_equal_scores_the_first_are_kept() -> None:
    assert most_wanted(torch.zeros(2, 4), [1, 3]).tolist() == [
        [True, False, False, False],
        [True, True, True, False],
    ]


def test_a_router_with_another_rule_is_refused_by_name_and_the_model_left_alone() -> None:
    model = tiny_model("deepseek_v3")
    before = logits(model)
    with pytest.raises(ValueError, match="DeepseekV3.*Router"):
        attach(model, mode="resident_only", slots=SLOTS, resident_scores_LE=scores(model))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lossy"}, "mode='lossy': must be one of"),
        ({"mode": "resident_only"}, "give resident_scores_LE"),
        ({"resident_scores_LE": torch.zeros(3, 16)}, "only for mode='resident_only'"),
        ({"mode": "resident_only", "resident_scores_LE": torch.zeros(3, 4)}, r"\[3, 4\]"),
        (
            {"mode": "resident_only", "resident_scores_LE": torch.full((3, 16), torch.nan)},
            "numbers",
        ),
    ],
)
def test_what_the_mode_cannot_work_with_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny_model("qwen3_moe"), slots=SLOTS, **options)


def test_neither_a_gpu_nor_a_predictor_serves_so() -> None:
    model = tiny_model("qwen3_moe")
    spec = spec_of(model)
    for device, predictor, message in (
        ("cuda", None, "only a CPU"),
        ("cpu", Popularity(), "popularity"),
    ):
        with pytest.raises(ValueError, match=message):
            check_mode(
                "resident_only",
                device=torch.device(device),
                spec=spec,
                predictor=predictor,
                scores_LE=scores(model),
            )
