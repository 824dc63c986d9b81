"""Decoder layers that are compiled for decode steps only: same answers, few programs, no traces."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from runtime.compiled_layers import CompiledLayers, not_compiled
from runtime.decode_graph import DecodeGraph, PlainRecorder
from runtime.engine import attach
from tests.families import tiny_model

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
NEW_TOKENS = 10
_HALF_SLIDING = ["sliding_attention", "full_attention"] * 2


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(family: str, **overrides: Any) -> Any:
    model = tiny_model(family, **overrides)
    model.set_experts_implementation("batched_mm")
    return model


def generate(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return answer


@pytest.mark.parametrize(
    ("family", "kinds"), [("qwen3_moe", 1), ("gpt_oss", 2), ("deepseek_v3", 2)]
)
def test_decode_steps_say_the_same_and_layers_of_a_kind_share_a_program(
    family: str, kinds: int
) -> None:
    """Neither a layer's number nor a position needs a program of its own."""
    overrides: dict[str, Any] = {"num_hidden_layers": 4}
    if family == "gpt_oss":
        overrides |= {"sliding_window": 64, "layer_types": _HALF_SLIDING}
    model = model_of(family, **overrides)
    expected = generate(model)
    compiled = CompiledLayers(model, backend="aot_eager")
    graph = DecodeGraph(model, recorder=PlainRecorder(), max_batch=4, compiled=compiled)
    try:
        assert torch.equal(generate(model), expected)
    finally:
        graph.remove()
    assert counters["stats"]["unique_graphs"] == kinds


@pytest.fixture
def kept_apart() -> Iterator[str]:
    """An implementation of experts that the compiler does not look into."""
    ALL_EXPERTS_FUNCTIONS["kept-apart"] = not_compiled(ALL_EXPERTS_FUNCTIONS["batched_mm"])
    yield "kept-apart"
    ALL_EXPERTS_FUNCTIONS.pop("kept-apart")


def test_experts_that_are_kept_from_the_compiler_cut_layers_into_shared_programs(
    kept_apart: str,
) -> None:
    programs = []
    for num_layers in (2, 5):
        model = model_of("qwen3_moe", num_hidden_layers=num_layers)
        expected = generate(model)
        model.set_experts_implementation(kept_apart)
        compiled = CompiledLayers(model, backend="aot_eager")
        graph = DecodeGraph(model, recorder=PlainRecorder(), max_batch=4, compiled=compiled)
        assert torch.equal(generate(model), expected)
        graph.remove()
        programs.append(counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
        counters.clear()
    assert programs[0] == programs[1] > 1


def test_only_what_is_in_use_is_compiled() -> None:
    model = model_of("qwen3_moe")
    expected = generate(model)
    compiled = CompiledLayers(model, backend="aot_eager")
    assert torch.equal(generate(model), expected)
    assert counters["stats"]["unique_graphs"] == 0
    with pytest.raises(RuntimeError, match="inside"), compiled.in_use():
        raise RuntimeError("inside")
    assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)


def test_layers_that_somebody_else_has_compiled_stay_so() -> None:
    model = model_of("qwen3_moe")
    first, second = list(model.get_decoder().layers)[:2]
    first.compile(backend="eager")
    theirs = first._compiled_call_impl
    with CompiledLayers(model, backend="eager").in_use():
        assert first._compiled_call_impl is not theirs
    assert first._compiled_call_impl is theirs
    assert second._compiled_call_impl is None


def test_the_compiler_does_not_look_into_what_is_kept_from_it() -> None:
    seen = []

    def outside(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    kept = not_compiled(outside)
    doubled = torch.compile(lambda x: kept(2 * x), backend="eager")
    assert doubled(torch.ones(1)).item() == 3
    assert seen == [False]


def test_a_decoder_without_layers_is_refused() -> None:
    model = model_of("qwen3_moe")
    model.get_decoder().layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="has no list of layers"):
        CompiledLayers(model)


def test_a_cpu_does_not_compile() -> None:
    with pytest.raises(ValueError, match="compile_layers=True: only for a GPU"):
        attach(model_of("qwen3_moe"), slots=4, compile_layers=True)
