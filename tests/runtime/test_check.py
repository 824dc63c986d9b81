"""The check passes for what equals the resident model, and names the layer where it does not."""

from typing import Any

import pytest
import torch

from runtime.check import NUM_ANSWER_TOKENS, compare, format_check, record
from runtime.engine import attach
from tests.families import tiny_model

IDS = list(range(5, 25))


def answer_of(recording: Any) -> list[int]:
    return list(recording.token_ids[recording.num_prompt_tokens :])


def test_an_offloaded_model_passes() -> None:
    model = tiny_model("qwen3_moe")
    resident = record(model, IDS)
    with attach(model, policy="lru", slots=4):
        result = compare(resident, record(model, IDS, answer_ids=answer_of(resident)))
    assert result.passed
    assert [layer.name for layer in result.layers][:2] == ["embedding", "layer 0"]
    assert len(result.layers) == model.config.num_hidden_layers + 2
    assert result.num_tokens == NUM_ANSWER_TOKENS
    assert format_check(result).endswith("check passed")


def test_the_answer_is_greedy_and_equals_generates() -> None:
    model = tiny_model("mixtral")
    inputs = torch.tensor([IDS])
    expected = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NUM_ANSWER_TOKENS,
        do_sample=False,
    )
    assert record(model, IDS).token_ids == expected[0].tolist()


@pytest.mark.parametrize("fault", [1.0, float("nan")])
def test_a_fault_shows_in_the_layer_where_it_begins(fault: float) -> None:
    model = tiny_model("qwen3_moe")
    resident = record(model, IDS)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(fault).add_(0.1)
    result = compare(resident, record(model, IDS, answer_ids=answer_of(resident)))
    assert not result.passed
    assert [layer.within for layer in result.layers][:3] == [True, True, False]
    table = format_check(result)
    assert "WRONG" in table
    assert table.endswith("check FAILED")


def test_recordings_of_different_tokens_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="different tokens"):
        compare(record(model, IDS), record(model, IDS[1:]))
