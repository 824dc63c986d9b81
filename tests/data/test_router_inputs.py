"""Router inputs read from a running model, against plain forwards of each request alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.adapters import moe_layers, spec_of
from data.errors import SpecMismatchError
from data.router_inputs import LiveInputs, RouterInputRecorder
from data.schema import Split, Trace, TraceList
from tests.families import FAMILIES, tiny_model

REQUESTS = [np.array(ids) for ids in ([5, 9, 23, 41, 7, 77, 12], [3, 99], [64, 2, 17, 31, 31])]


def inputs_of(model: Any, token_ids: Any) -> torch.Tensor:
    """What each router received in one plain forward: [L, T, D]."""
    seen: list[torch.Tensor] = []
    handles = [
        moe.router.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        for moe in moe_layers(model)
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def traces_of(model: Any, token_ids: list[np.ndarray | None], split: Split = "fit") -> TraceList:
    spec = spec_of(model)
    traces = [
        Trace(
            request_id=f"r{n}",
            source="test",
            topic="",
            topk_expert_ids_TLK=np.zeros((4, spec.num_layers, spec.top_k), np.uint8),
            num_prompt_tokens=4,
            first_routed_position=0,
            token_ids_P=None if ids is None else ids.astype(np.int32),
        )
        for n, ids in enumerate(token_ids)
    ]
    return TraceList(
        spec=spec, traces=traces, split={t.request_id: split for t in traces}, digest="test"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_inputs_are_those_of_each_request_alone(family: str) -> None:
    model = tiny_model(family)
    (tokens,) = LiveInputs(model, {"fit": REQUESTS}).batches("fit")
    assert tokens.router_input_LND is not None
    starts = tokens.starts_N.nonzero().flatten().tolist()
    assert starts == [0, 7, 9]
    for ids, part_LTD in zip(
        REQUESTS, tokens.router_input_LND.split([7, 2, 5], dim=1), strict=True
    ):
        torch.testing.assert_close(part_LTD, inputs_of(model, ids.tolist()), atol=1e-4, rtol=1e-4)
    assert tokens.token_ids_N.tolist() == np.concatenate(REQUESTS).tolist()
    torch.testing.assert_close(
        tokens.router_probs_LNE.sum(-1), torch.ones(tokens.router_probs_LNE.shape[:2])
    )


def test_batches_hold_every_request_once_whatever_the_seed() -> None:
    model = tiny_model("olmoe")
    source = LiveInputs(model, {"fit": REQUESTS * 3}, max_batch_tokens=14)
    firsts = {}
    for seed in (None, 0, 1):
        batches = list(source.batches("fit", seed=seed))
        assert all(len(batch.starts_N) <= 14 for batch in batches)
        assert sum(int(batch.starts_N.sum()) for batch in batches) == 9
        firsts[seed] = [batch.token_ids_N.tolist() for batch in batches]
    assert firsts[0] != firsts[1]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("qwen3_moe")
    before = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), RouterInputRecorder(model):
        raise ZeroDivisionError
    list(LiveInputs(model, {"fit": REQUESTS}).batches("fit"))
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_traces_bring_their_tokens_and_their_split() -> None:
    model = tiny_model("olmoe")
    source = LiveInputs.of_traces(model, traces_of(model, list(REQUESTS), "val"))
    (tokens,) = source.batches("val")
    assert tokens.token_ids_N.tolist() == np.concatenate(REQUESTS).tolist()
    assert not list(source.batches("fit"))


def test_traces_of_another_model_say_what_is_needed() -> None:
    model = tiny_model("olmoe")
    traces = traces_of(model, list(REQUESTS))
    other = replace(traces, spec=replace(traces.spec, num_experts=8, model_id="other"))
    with pytest.raises(SpecMismatchError, match=r"other .*8 experts.*model="):
        LiveInputs.of_traces(model, other)


def test_traces_without_tokens_say_what_is_needed() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="'r0' .* has no token ids"):
        LiveInputs.of_traces(model, traces_of(model, [None]))


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(ValueError, match="'fit' has no tokens"):
        LiveInputs(tiny_model("olmoe"), {"fit": [np.array([], np.int64)]})
