"""One sequence over captured steps says what it says over plain ones."""

from collections.abc import Iterator
from typing import Any

import pytest

from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from tests.families import tiny_model
from tests.runtime.server.fakes import NOTHING, Captured, generate


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "mixtral"])
def captured(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Captured]]:
    window = {"sliding_window": 16} if request.param == "gpt_oss" else {}
    model = tiny_model(request.param, **window)
    offload = Captured(model)
    yield model, offload
    offload.graph.remove()


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_lone_sequence_replays_captured_steps_and_says_the_same(
    captured: tuple[Any, Captured], tokenizer: Any, chunk_tokens: int | None
) -> None:
    model, offload = captured
    model.generation_config.prefill_chunk_size = chunk_tokens
    prompts = [list(range(5, 25)), [3], list(range(40, 50))]
    said = []
    for given in (None, offload):
        engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=given)
        engine.start()
        said.append(
            [
                generate(
                    engine,
                    ids,
                    max_tokens=12,
                    ignore_eos=True,
                    sampling=SamplingParams(temperature=0.0),
                )[0]
                for ids in prompts
            ]
        )
        engine.shutdown()
    assert said[0] == said[1]
    stats = offload.graph.add_to(NOTHING)
    # One graph for all sequences; a sliding window that is full is another kind of step.
    num_kinds = 2 if model.config.model_type == "gpt_oss" else 1
    assert stats.graph_captures == num_kinds
    assert stats.graph_replays >= 3 * 11 - num_kinds
