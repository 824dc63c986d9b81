"""The engine says what ``model.generate`` says, one token at a time, and survives everything."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import (
    ContextLengthError,
    EngineUnavailableError,
    Failure,
    Generation,
    Outcome,
    Piece,
    QueueFullError,
)
from tests.runtime.server.fakes import (
    FakeOffload,
    Listener,
    ScriptedModel,
    generate,
    request,
    submit_one,
    wait_until,
)

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = ["The recipe needs", "def add(a, b):\n", "Dear customer, your booking"]
Start = Callable[..., GenerationEngine]


@pytest.fixture
def start(tokenizer: Any) -> Iterator[Start]:
    """Start engines that end with the test."""
    engines = []

    def start_engine(model: Any, *, observer: Any = None, **kwargs: Any) -> GenerationEngine:
        engine = GenerationEngine(model=model, tokenizer=tokenizer, **kwargs)
        engines.append((engine, model))
        engine.start(observer)
        return engine

    yield start_engine
    for engine, model in engines:
        if isinstance(model, ScriptedModel):
            model.let(10_000)
        engine.shutdown()


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: Any) -> Iterator[GenerationEngine]:
    """The embedded model's."""
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    engine.start()
    yield engine
    engine.shutdown()


def stock(model: Any, ids: list[int], num_tokens: int, **kwargs: Any) -> list[int]:
    """What ``model.generate`` appends to ``ids``."""
    inputs = torch.tensor([ids])
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, **kwargs
    )
    new: list[int] = output[0, len(ids) :].tolist()
    return new


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_those_of_generate(
    engine: GenerationEngine, model: Any, tokenizer: Any, prompt: str
) -> None:
    ids = tokenizer(prompt).input_ids
    expected = stock(model, ids, 24, do_sample=False)
    got, text, reason = generate(engine, ids, max_tokens=24, sampling=GREEDY)
    assert got == expected
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert reason == ("stop" if len(expected) < 24 else "length")


def test_sampled_tokens_equal_those_of_generate_for_one_seed(
    engine: GenerationEngine, model: Any, tokenizer: Any
) -> None:
    ids = tokenizer(PROMPTS[0]).input_ids
    torch.manual_seed(7)
    expected = stock(model, ids, 16, do_sample=True, temperature=0.8, top_k=50, top_p=0.9)
    sampling = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=7)
    assert generate(engine, ids, max_tokens=16, sampling=sampling)[0] == expected


def test_requests_do_not_disturb_each_other(
    engine: GenerationEngine, model: Any, tokenizer: Any
) -> None:
    listeners = [Listener() for _ in PROMPTS]
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for ids, listener in zip(prompts, listeners, strict=True):
        submit_one(engine, listener, prompt_ids=ids, max_tokens=8, sampling=GREEDY)
    for ids, listener in zip(prompts, listeners, strict=True):
        got = [piece.token_id for piece in listener.until_end() if isinstance(piece, Piece)]
        assert got == stock(model, ids, 8, do_sample=False)


def test_the_end_of_sequence_token_ends_the_text_and_is_counted(
    start: Start, tokenizer: Any
) -> None:
    ids = tokenizer("all done", add_special_tokens=False).input_ids
    eos = tokenizer.eos_token_id
    engine = start(ScriptedModel([*ids, eos], eos_id=eos))
    assert generate(engine, [10, 11], max_tokens=50) == ([*ids, eos], "all done", "stop")
    got, text, reason = generate(engine, [10], max_tokens=50, ignore_eos=True)
    assert (len(got), text, reason) == (50, "all done", "length")


def test_a_model_may_have_several_ends(start: Start, tokenizer: Any) -> None:
    model = ScriptedModel([20, 30, 6])
    model.generation_config.eos_token_id = [2, 6]
    assert generate(start(model), [10])[0] == [20, 30, 6]


def test_a_stop_string_across_tokens_ends_the_text_before_it(start: Start, tokenizer: Any) -> None:
    text = "one two END three four five"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    engine = start(ScriptedModel(ids))
    got, shown, reason = generate(engine, [10], stops=["wo END t", "never"])
    assert (shown, reason) == ("one t", "stop")
    assert got == ids[: len(got)]
    assert len(got) < len(ids)  # nothing was computed after it


def test_max_tokens_cuts_a_character_that_never_came(start: Start, tokenizer: Any) -> None:
    ids = tokenizer("🎉", add_special_tokens=False).input_ids
    assert len(ids) > 1
    engine = start(ScriptedModel(ids))
    got, text, reason = generate(engine, [10], max_tokens=1)
    assert (got, text, reason) == (ids[:1], tokenizer.decode(ids[:1]), "length")


def test_every_token_is_a_piece_even_where_it_shows_nothing_yet(
    start: Start, tokenizer: Any
) -> None:
    ids = tokenizer("🎉!", add_special_tokens=False).input_ids
    listener = Listener()
    submit_one(start(ScriptedModel(ids)), listener, max_tokens=len(ids))
    pieces = listener.until_end()
    assert [piece.token_id for piece in pieces if isinstance(piece, Piece)] == ids
    assert [piece.text for piece in pieces if isinstance(piece, Piece)][:1] == [""]


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(start: Start) -> None:
    engine = start(ScriptedModel([20]), max_context_tokens=16)
    with pytest.raises(ContextLengthError, match="16 tokens, the model's context 16"):
        engine.submit([request([10] * 16)], Listener())
    with pytest.raises(ContextLengthError, match=r"10 tokens and 7 more .* context is 16"):
        engine.submit([request([10] * 10, max_tokens=7)], Listener())
    assert len(generate(engine, [10] * 10, max_tokens=6)[0]) == 6
    assert len(generate(engine, [10] * 10)[0]) == 6
    assert len(generate(engine, [10] * 10, default_max_tokens=4)[0]) == 4
    assert len(generate(engine, [10] * 14, default_max_tokens=4)[0]) == 2


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [5, 4096]}, r"token id 4096: the model has 0\.\.4095"),
        ({"prompt_ids": [-1]}, "token id -1"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_served_is_refused(
    start: Start, wrong: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        start(ScriptedModel([20])).submit([request(**wrong)], Listener())


def test_a_full_queue_refuses_all_of_a_request_or_none(start: Start) -> None:
    model = ScriptedModel([20], permits=1)
    engine = start(model, max_queue=2)
    listener = Listener()
    submit_one(engine, listener, max_tokens=1)
    wait_until(lambda: engine.num_running == 1)
    engine.submit([request(max_tokens=1)], listener)
    with pytest.raises(QueueFullError, match="2 of 3 places are taken and 2 were asked for"):
        engine.submit([request(), request()], Listener())
    assert engine.num_waiting == 1
    with pytest.raises(ValueError, match="4 sequences .* at most 3"):
        engine.submit([request()] * 4, Listener())
    model.let(2)
    listener.until_end()
    listener.until_end()
    wait_until(lambda: engine.num_running == 0)
    model.let(3)
    assert len(engine.submit([request(max_tokens=1)] * 3, Listener())) == 3


def test_those_that_wait_are_told_in_the_order_in_which_they_came(start: Start) -> None:
    model = ScriptedModel([20], permits=1)
    engine = start(model)
    submit_one(engine, Listener(), max_tokens=1, prompt_text="runs")
    wait_until(lambda: engine.num_running == 1)
    cancelled = submit_one(engine, Listener(), prompt_text="cancelled")
    submit_one(engine, Listener(), prompt_ids=[10, 11], prompt_text="first")
    submit_one(engine, Listener(), prompt_ids=[12])
    cancelled.cancel()
    assert engine.waiting_prompts(8) == [("first", 2), (engine.tokenizer.decode([12]), 1)]
    assert engine.waiting_prompts(1) == [("first", 2)]


def test_a_cancelled_sequence_frees_the_engine(start: Start) -> None:
    model = ScriptedModel([20], permits=1)
    engine = start(model)
    first, second = Listener(), Listener()
    running = submit_one(engine, first, max_tokens=100)
    submit_one(engine, second, max_tokens=1)
    model.let(1)
    first.next()
    running.cancel()
    model.let(2)  # the pass that was under way, and the second sequence's own
    second.until_end()
    assert model.num_forwards <= 4
    assert running.num_tokens <= 2


def test_a_cancelled_sequence_gives_its_place_in_the_queue_back(start: Start) -> None:
    model = ScriptedModel([20], permits=1)
    engine = start(model, max_queue=1)
    submit_one(engine, Listener(), max_tokens=1)
    wait_until(lambda: engine.num_running == 1)
    waiting = submit_one(engine, Listener())
    waiting.cancel()
    waiting.cancel()
    assert engine.num_waiting == 0
    submit_one(engine, Listener())


def test_a_failure_reaches_its_own_request_and_no_other(start: Start) -> None:
    engine = start(ScriptedModel([20, 30], broken={2: RuntimeError("no memory")}))
    with pytest.raises(RuntimeError, match="no memory"):
        generate(engine, [10], max_tokens=5)
    assert generate(engine, [10], max_tokens=2)[0] == [20, 30]
    assert engine.state == "ready"


def test_a_model_that_does_not_run_is_reported_and_not_served(start: Start) -> None:
    engine = start(ScriptedModel([20], broken={0: RuntimeError("bad weights")}))
    wait_until(lambda: engine.state == "failed")
    assert str(engine.failure) == "bad weights"
    with pytest.raises(EngineUnavailableError, match="bad weights"):
        engine.submit([request()], Listener())


def test_what_came_while_loading_is_answered_or_told(start: Start) -> None:
    engine = start(ScriptedModel([20]))
    assert generate(engine, [10], max_tokens=1)[0] == [20]  # whether or not it was ready
    model = ScriptedModel([20], permits=0, broken={0: RuntimeError("bad weights")})
    engine, listener = start(model), Listener()
    assert engine.state == "loading"
    submit_one(engine, listener)
    model.let(1)
    (failure,) = listener.until_end()
    assert isinstance(failure, Failure)
    assert "bad weights" in str(failure.error)


def test_shutdown_finishes_what_was_submitted(start: Start) -> None:
    engine, listener = start(ScriptedModel([20])), Listener()
    engine.submit([request(max_tokens=20), request(max_tokens=20)], listener)
    engine.shutdown(drain_s=60)
    ends = [listener.until_end()[-1], listener.until_end()[-1]]
    assert [end.finish_reason for end in ends if isinstance(end, Piece)] == ["length", "length"]
    assert engine.state == "stopped"
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        engine.submit([request()], listener)


def test_shutdown_at_its_deadline_tells_those_that_are_cut_off(start: Start) -> None:
    model = ScriptedModel([20], permits=1)
    engine = start(model)
    running, waiting = Listener(), Listener()
    submit_one(engine, running, max_tokens=100)
    wait_until(lambda: engine.num_running == 1)
    submit_one(engine, waiting)

    def compute_once_the_deadline_is_over() -> None:
        wait_until(lambda: engine.state == "stopped")
        model.let(1)

    late = threading.Thread(target=compute_once_the_deadline_is_over)
    late.start()
    engine.shutdown(drain_s=0.01)
    late.join()
    for listener in (running, waiting):
        end = listener.until_end()[-1]
        assert isinstance(end, Failure)
        assert isinstance(end.error, EngineUnavailableError)


def test_shutdown_before_start_does_nothing(tokenizer: Any) -> None:
    engine = GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer)
    engine.shutdown()
    with pytest.raises(EngineUnavailableError):
        engine.submit([request()], Listener())


def test_the_offload_hears_of_each_request_before_it_runs(start: Start, tokenizer: Any) -> None:
    offload = FakeOffload()
    engine = start(ScriptedModel([20]), offload=offload)
    ids = tokenizer("known by ids", add_special_tokens=False).input_ids
    generate(engine, [10], max_tokens=1, prompt_text="known by text")
    generate(engine, ids, max_tokens=1)
    told = [row for row in offload.rows if row.key != "try-out"]
    assert [row.prompt for row in told] == ["known by text", "known by ids"]
    assert [list(row.ids) for row in told] == [[10], ids]
    assert offload.ended == [("try-out", False), (told[0].key, True), (told[1].key, True)]


class RecordingObserver:
    def __init__(self) -> None:
        self.read: list[int] = []
        self.ends: list[tuple[int, Outcome]] = []
        self.steps: list[tuple[int, int]] = []

    def on_token(self, *, num_prompt_tokens: int, since_last_s: float) -> None:
        assert since_last_s >= 0
        self.read.append(num_prompt_tokens)

    def on_step(self, *, num_tokens: int, num_sequences: int) -> None:
        self.steps.append((num_tokens, num_sequences))

    def on_end(self, generation: Generation, outcome: Outcome) -> None:
        self.ends.append((generation.num_tokens, outcome))


def test_the_observer_hears_every_token_and_every_end(start: Start) -> None:
    observer = RecordingObserver()
    model = ScriptedModel([20, 30, 40, 2], eos_id=2, broken={7: RuntimeError("x")})
    engine = start(model, observer=observer)
    generate(engine, [10, 11, 12], max_tokens=2)
    generate(engine, [10])
    with pytest.raises(RuntimeError):
        generate(engine, [10])
    engine.shutdown()
    assert observer.read == [3, 0, 1, 0, 0, 0]
    assert observer.steps == [(4, 1), (1, 1), (2, 1), *[(1, 1)] * 3]
    assert observer.ends == [(2, "length"), (4, "stop"), (0, "error")]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"max_queue": -1}, "max_queue=-1"),
        ({"max_context_tokens": 1}, "max_context_tokens=1: must be at least 2"),
        ({"max_context_tokens": 257}, "at most max_position_embeddings=256"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(tokenizer: Any, wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer, **wrong)


def test_a_model_without_a_limit_needs_one(tokenizer: Any) -> None:
    model = ScriptedModel([20])
    model.config = PreTrainedConfig(vocab_size=4096)
    with pytest.raises(ValueError, match="max_context_tokens is needed"):
        GenerationEngine(model=model, tokenizer=tokenizer)
    engine = GenerationEngine(model=model, tokenizer=tokenizer, max_context_tokens=64)
    assert engine.max_context_tokens == 64
