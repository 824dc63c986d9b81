"""A model whose decode steps are replayed says what it says without, and can be had back."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from runtime import decode_graph
from runtime.backend import OffloadStats
from runtime.decode_graph import DecodeGraph
from tests.families import FAMILIES, tiny_model
from tests.runtime.graph_fakes import TapeRecorder

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW_TOKENS = 12
REPLAYS = NEW_TOKENS - 2  # the prompt gives the first token, the first step runs as it is


@contextmanager
def replaying(model: Any, *, max_batch: int = 4) -> Iterator[DecodeGraph]:
    graph = DecodeGraph(model, recorder=TapeRecorder(), max_batch=max_batch)
    try:
        yield graph
    finally:
        graph.remove()


@pytest.fixture
def model() -> Any:
    return fixed_shape_model("qwen3_moe")


def fixed_shape_model(family: str, **overrides: Any) -> Any:
    model = tiny_model(family, **overrides)
    model.set_experts_implementation("batched_mm")  # the one stock way that never waits
    return model


def generate(model: Any, rows: list[list[int]] | None = None, **options: Any) -> Any:
    ids_BT = torch.tensor(rows or [PROMPT])
    options = {"attention_mask": (ids_BT != 0).long(), "do_sample": False, **options}
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **options}
    return model.generate(ids_BT, min_new_tokens=options["max_new_tokens"], **options)


def stats_of(graph: DecodeGraph) -> OffloadStats:
    none = OffloadStats(hits=0, misses=0, streamed=0, evictions=0, miss_bytes=0, stall_s=0.0)
    return graph.add_to(none)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_the_same_from_replayed_steps(family: str) -> None:
    model = fixed_shape_model(family)
    expected = generate(model)
    with replaying(model) as graph:
        assert torch.equal(generate(model), expected)
        stats = stats_of(graph)
    assert stats.graph_captures == 1, stats
    assert stats.graph_replays == REPLAYS
    assert len(set(expected[0].tolist())) > 5, "a text that repeats itself would prove little"


def test_a_sliding_window_that_fills_up_on_the_way_changes_nothing() -> None:
    """Its layer counts positions in a Python integer and works in two ways: each needs a graph."""
    model = fixed_shape_model("gpt_oss", sliding_window=14)
    expected = generate(model, max_new_tokens=24)
    with replaying(model) as graph:
        for _ in range(2):
            assert torch.equal(generate(model, max_new_tokens=24), expected)
        assert stats_of(graph).graph_captures == 2


def test_padded_rows_generate_the_same(model: Any) -> None:
    rows = [PROMPT, [0, 0, 0, *PROMPT[:5]], [0, *PROMPT[1:]]]
    expected = generate(model, rows)
    with replaying(model) as graph:
        assert torch.equal(generate(model, rows), expected)
        assert stats_of(graph).graph_replays == REPLAYS


def test_sampling_draws_the_same(model: Any) -> None:
    said = []
    for attached in (False, True):
        torch.manual_seed(7)
        if not attached:
            said.append(generate(model, do_sample=True))
            continue
        with replaying(model):
            said.append(generate(model, do_sample=True))
    assert torch.equal(*said)
    assert not torch.equal(said[0], generate(model))


def test_a_streamer_gets_every_token(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    expected, streamer = generate(model)[0].tolist(), Streamer()
    with replaying(model):
        generate(model, streamer=streamer)
    assert streamer.tokens == [*expected, -1]


def test_the_next_request_is_replayed_in_the_memory_of_the_last(model: Any) -> None:
    """A recording that kept its cache alive made every request capture anew, and kept its memory:
    the pool gives memory out again only once nobody holds the cache."""
    with replaying(model) as graph:
        generate(model)
        generate(model, [PROMPT[::-1]])
        generate(model, max_new_tokens=4)
        assert stats_of(graph).graph_captures == 1
        assert stats_of(graph).graph_replays == REPLAYS + (NEW_TOKENS - 1) + 3


def test_a_cache_that_its_caller_keeps_is_left_alone(model: Any) -> None:
    """A chat's second turn brings the first one's cache, after another request came between."""
    expected = generate(model)
    with replaying(model):
        kept = generate(model, max_new_tokens=5, return_dict_in_generate=True, max_cache_len=32)
        generate(model, [PROMPT[::-1]])
        turn = kept.sequences.tolist()
        cache = kept.past_key_values
        assert torch.equal(generate(model, turn, past_key_values=cache, max_new_tokens=7), expected)


def test_memory_holds_one_cache_and_its_graphs(model: Any) -> None:
    with replaying(model) as graph:
        generate(model)
        keys = weakref.ref(graph._kv._layers[0].keys)
        generate(model, [PROMPT, PROMPT[::-1]])
        assert keys() is None
        assert [len(kind.inputs["input_ids"]) for kind in graph._steps.values()] == [2]


def test_beams_are_searched_as_before(model: Any) -> None:
    expected = generate(model, num_beams=3)
    with replaying(model) as graph:
        assert torch.equal(generate(model, num_beams=3), expected)
        assert stats_of(graph).graph_captures == 0


def test_outputs_belong_to_the_caller(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    with replaying(model) as graph, torch.no_grad():
        model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
        outputs = [step(model, cache, position) for position in range(8, 13)]
        assert stats_of(graph).graph_replays == 4
        assert all(output.past_key_values is cache for output in outputs)
    fresh = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPT]), past_key_values=fresh, use_cache=True)
        for position, output in zip(range(8, 13), outputs, strict=True):
            stock = model(
                input_ids=torch.tensor([[position]]), past_key_values=fresh, use_cache=True
            )
            torch.testing.assert_close(output.logits, stock.logits)


def step(model: Any, cache: Any, position: int, **options: Any) -> Any:
    """One decode step, prepared as ``generate`` prepares it; token ids are positions."""
    mask = (torch.arange(32) <= position)[None, None, None]
    arguments = {
        "input_ids": torch.tensor([[position]]),
        "position_ids": torch.tensor([[position]]),
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": True,
    }
    return model(**{**arguments, **options})


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"output_attentions": True}, "output_attentions"),
     ({"output_hidden_states": True}, "output_hidden_states"),
     ({"attention_mask": None}, "a mask left to the model"),
     ({"attention_mask": torch.ones(1, 9)}, "a mask left to the model"),
     ({"position_ids": None}, "positions left to the model"),
     ({"past_key_values": None, "attention_mask": None}, "no static KV cache"),
     ({"labels": torch.tensor([[3]])}, "labels"),
     ({"input_ids": torch.ones(5, 1, dtype=torch.long)}, "more than 4 rows")],
)  # fmt: skip
def test_other_calls_go_to_the_models_own_forward_and_say_why(
    model: Any, options: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "output_attentions":
        model.set_attn_implementation("eager")
    rows = len(options.get("input_ids", [0]))
    cache = StaticCache(config=model.config, max_cache_len=32)
    with replaying(model) as graph, torch.no_grad(), caplog.at_level("INFO"):
        model(input_ids=torch.tensor([PROMPT] * rows), past_key_values=cache, use_cache=True)
        for _ in range(2):
            step(model, cache, 8, **options)
        calls = stats_of(graph).eager_calls
    assert {"several tokens a row": 1, reason: 2} == calls
    assert caplog.text.count(f"forward passes with {reason}") == 1


def test_a_cache_that_grows_is_not_captured(model: Any) -> None:
    expected = generate(model)
    with replaying(model) as graph:
        assert torch.equal(generate(model, cache_implementation="dynamic"), expected)
        assert stats_of(graph).graph_captures == 0
        assert stats_of(graph).eager_calls["KV cache of DynamicLayer"] == NEW_TOKENS - 1


def test_a_step_that_waits_for_the_host_runs_uncaptured(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def read(module: nn.Module, args: Any, output: Tensor) -> None:
        assert output.abs().max().item() > 0

    expected = generate(model)
    model.model.norm.register_forward_hook(read)
    with replaying(model) as graph:
        assert torch.equal(generate(model), expected)
        stats = stats_of(graph)
    assert stats.eager_calls["a step that cannot be captured"] == REPLAYS
    assert stats.graph_replays == 0
    assert caplog.text.count("could not be captured") == 1


def test_of_steps_that_cannot_be_captured_few_are_kept_and_none_over_memory_that_is_gone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are known by addresses, which another KV cache may be given later."""

    def read(module: nn.Module, args: Any, output: Tensor) -> None:
        assert output.abs().max().item() > 0

    monkeypatch.setattr(decode_graph, "_MAX_GRAPHS", 2)
    model.model.norm.register_forward_hook(read)
    with replaying(model) as graph:
        for rows in ([PROMPT], [PROMPT] * 2, [PROMPT]):
            generate(model, rows)
            assert len(graph._failed) == 1
        graph._failed.clear()
        caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(4)]
        for cache in caches:
            generate(model, past_key_values=cache)
        assert len(graph._failed) == 2
        num_eager = stats_of(graph).eager_calls["a step that cannot be captured"]
    assert num_eager == 7 * REPLAYS


def test_removing_leaves_the_model_as_it_was(model: Any) -> None:
    before, config = dict(vars(model)), model.generation_config.to_dict()
    with replaying(model):
        assert vars(model) != before
        generate(model)
    assert vars(model) == before
    assert model.generation_config.to_dict() == config


def test_inference_mode_generates_too(model: Any) -> None:
    expected = generate(model)
    with replaying(model):
        with torch.inference_mode():
            assert torch.equal(generate(model), expected)
        assert torch.equal(generate(model), expected)
