"""Many sequences in one forward pass: each one's answer is the one that it gets alone."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.adapters import spec_of
from data.schema import MoESpec
from data.tiny_moe import TINY_MOE_DIR
from predictors.base import Forecast, Request, State
from runtime.engine import attach
from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Failure, Piece
from tests.fakes import ScriptedPredictor
from tests.runtime.server.fakes import Listener, generate, request, submit_one, wait_until
from tests.runtime.server.faulty import kill

GREEDY = SamplingParams(temperature=0.0)
TEXTS = [
    "The recipe needs",
    "def add(a, b):\n    return",
    "Dear customer, your booking",
    "x",
    "In the beginning there was a long and winding sentence that went on. " * 6,
    "The recipe needs two eggs",
    "def add(a, b):\n    return",
    "1 2 3 4 5 6 7 8",
]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=11)
Start = Callable[..., GenerationEngine]


@pytest.fixture
def start(model: Any, tokenizer: Any) -> Iterator[Start]:
    """Start engines on the embedded model that end with the test."""
    engines = []

    def start_engine(**kwargs: Any) -> GenerationEngine:
        engine = GenerationEngine(
            model=model, **{"tokenizer": tokenizer, "mode": "batched", **kwargs}
        )
        engines.append(engine)
        engine.start()
        wait_until(lambda: engine.state in ("ready", "failed"))
        return engine

    yield start_engine
    for engine in engines:
        engine.shutdown()
    assert model.config._attn_implementation == "sdpa"  # as it was


@pytest.fixture(scope="module")
def alone(model: Any, tokenizer: Any) -> Callable[..., tuple[list[int], str, str | None]]:
    """What the engine that runs one sequence at a time says."""

    def ask(prompt_ids: list[int], **kwargs: Any) -> tuple[list[int], str, str | None]:
        engine = GenerationEngine(model=model, tokenizer=tokenizer)
        engine.start()
        try:
            return generate(engine, prompt_ids, **kwargs)
        finally:
            engine.shutdown()

    return ask


def answers(listeners: list[Listener]) -> list[tuple[list[int], str, str | None]]:
    told = []
    for listener in listeners:
        pieces = [piece for piece in listener.until_end() if isinstance(piece, Piece)]
        text = "".join(piece.text for piece in pieces)
        told.append(([piece.token_id for piece in pieces], text, pieces[-1].finish_reason))
    return told


@pytest.mark.parametrize("max_batch", [1, 3, 16])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_the_neighbours(
    start: Start, alone: Any, tokenizer: Any, max_batch: int, sampling: SamplingParams
) -> None:
    asks = [
        {"prompt_ids": tokenizer(text).input_ids, "max_tokens": 5 + 3 * i, "sampling": sampling}
        for i, text in enumerate(TEXTS)
    ]
    expected = [alone(**ask) for ask in asks]
    engine = start(max_batch=max_batch)
    listeners = [Listener() for _ in asks]
    for ask, listener in zip(asks, listeners, strict=True):
        submit_one(engine, listener, **ask)
    assert answers(listeners) == expected
    wait_until(lambda: engine.num_running == engine.num_waiting == 0)


def test_sequences_really_run_together(start: Start, tokenizer: Any) -> None:
    sizes: list[int] = []
    engine = start(max_batch=4)

    class Steps:
        def on_token(self, **kwargs: Any) -> None: ...
        def on_end(self, *args: Any) -> None: ...
        def on_step(self, *, num_tokens: int, num_sequences: int) -> None:
            sizes.append(num_sequences)

    engine._worker.observer = Steps()
    listeners = [Listener() for _ in range(6)]
    engine_ids = tokenizer("hello there").input_ids
    for listener in listeners:
        submit_one(engine, listener, prompt_ids=engine_ids, max_tokens=20, sampling=GREEDY)
    answers(listeners)
    assert max(sizes) == 4


def test_stop_strings_and_choices_end_each_sequence_by_itself(
    start: Start, alone: Any, tokenizer: Any
) -> None:
    ids = tokenizer(TEXTS[0]).input_ids
    whole = alone(ids, max_tokens=24, sampling=GREEDY)[1]
    stop = whole[len(whole) // 2 :][:3]
    expected = alone(ids, max_tokens=24, sampling=GREEDY, stops=[stop])
    engine = start()
    listener, other = Listener(), Listener()
    submit_one(engine, listener, prompt_ids=ids, max_tokens=24, sampling=GREEDY, stops=[stop])
    submit_one(engine, other, prompt_ids=ids, max_tokens=24, sampling=GREEDY)
    stopped, unstopped = answers([listener, other])
    assert stopped == expected
    assert stopped[2] == "stop"
    assert unstopped[1] == whole


def test_a_common_prefix_is_computed_once(start: Start, alone: Any, tokenizer: Any) -> None:
    prefix = tokenizer(TEXTS[4]).input_ids
    prompts = [[*prefix, 5, 6, 7], [*prefix, 8, 9]]
    expected = [alone(ids, max_tokens=6, sampling=GREEDY) for ids in prompts]
    engine = start()
    assert [generate(engine, ids, max_tokens=6, sampling=GREEDY) for ids in prompts] == expected
    looked_up, found = engine.prefix_tokens
    assert looked_up == 2 * len(prefix) + 5
    assert found == len(prefix) // 32 * 32


def test_a_cancelled_sequence_gives_its_pages_back(start: Start, tokenizer: Any) -> None:
    engine = start()
    staying, leaving = Listener(), Listener()
    ids = tokenizer(TEXTS[4]).input_ids
    submit_one(engine, staying, prompt_ids=[20, 30], max_tokens=200, ignore_eos=True)
    gone = submit_one(engine, leaving, prompt_ids=ids, max_tokens=1500, ignore_eos=True)
    leaving.next()
    held = engine.kv_usage
    gone.cancel()
    wait_until(lambda: engine.num_running == 1)
    wait_until(lambda: engine.kv_usage < held)
    assert len(staying.until_end()) == 200
    wait_until(lambda: engine.kv_usage == 0.0)


def test_a_cancelled_sequence_that_waits_for_the_batch_gives_its_place_back(start: Start) -> None:
    engine = start(max_batch=1, max_queue=1)
    listener, never = Listener(), Listener()
    running = submit_one(engine, listener, prompt_ids=[20], max_tokens=1000, ignore_eos=True)
    listener.next()
    waiting = submit_one(engine, never, prompt_ids=[30])
    waiting.cancel()
    assert engine.num_waiting == 0
    last = Listener()
    submit_one(engine, last, prompt_ids=[40], max_tokens=2, ignore_eos=True)
    running.cancel()
    assert len(last.until_end()) == 2
    assert never.is_quiet()


def test_a_full_cache_lets_some_begin_again_and_loses_none(
    start: Start, alone: Any, tokenizer: Any
) -> None:
    """More tokens than pages: transformers takes pages away and computes those tokens anew."""
    asks: list[dict[str, Any]] = [
        {"prompt_ids": [20 + i] * 40, "max_tokens": 60, "sampling": GREEDY, "ignore_eos": True}
        for i in range(5)
    ]
    expected = [alone(**ask) for ask in asks]
    engine = start(max_batch=8, max_context_tokens=128, kv_tokens=128)
    listeners = [Listener() for _ in asks]
    for ask, listener in zip(asks, listeners, strict=True):
        submit_one(engine, listener, **ask)
    assert answers(listeners) == expected


def test_an_error_in_a_step_ends_that_batch_and_the_engine_lives_on(
    start: Start, model: Any, tokenizer: Any
) -> None:
    engine = start()
    handle = model.register_forward_pre_hook(broken_once())
    listeners = [Listener(), Listener()]
    for listener in listeners:
        submit_one(engine, listener, prompt_ids=[20, 30], max_tokens=5)
    ends = [listener.until_end()[-1] for listener in listeners]
    handle.remove()
    errors = [str(end.error) for end in ends if isinstance(end, Failure)]
    assert set(errors) == {"no memory"}
    assert engine.state == "ready"
    assert engine.num_restarts == 1
    assert len(generate(engine, [20, 30], max_tokens=3, ignore_eos=True)[0]) == 3


def broken_once() -> Callable[..., None]:
    has_broken = threading.Event()

    def hook(*args: Any) -> None:
        if not has_broken.is_set():
            has_broken.set()
            raise RuntimeError("no memory")

    return hook


@pytest.mark.parametrize("mode", ["single", "batched"])
def test_a_killed_thread_tells_those_that_ran_and_serves_those_that_come(
    start: Start, mode: str
) -> None:
    engine = start(mode=mode)
    listener = Listener()
    submit_one(engine, listener, prompt_ids=[20, 30], max_tokens=1500, ignore_eos=True)
    listener.next()
    kill(engine._thread)
    end = listener.until_end()[-1]
    assert isinstance(end, Failure)
    assert "interrupted: SystemExit" in str(end.error)
    assert len(generate(engine, [20, 30], max_tokens=3, ignore_eos=True)[0]) == 3
    assert engine.num_restarts == 1
    assert engine.state == "ready"


def test_an_engine_that_gets_nowhere_fails_and_tells_everybody(start: Start) -> None:
    engine = start()

    def broken() -> bool:
        raise MemoryError("always")

    engine._worker.step = broken  # type: ignore[method-assign]
    listeners = [Listener() for _ in range(5)]
    for listener in listeners:
        try:
            submit_one(engine, listener, prompt_ids=[20])
        except RuntimeError:  # it has given up already
            break
        end = listener.until_end()[-1]
        assert isinstance(end, Failure)
    wait_until(lambda: engine.state == "failed")
    assert isinstance(engine.failure, MemoryError)


def test_auto_measures_and_a_lone_sequence_moves_when_others_come(
    start: Start, alone: Any, tokenizer: Any
) -> None:
    ids = tokenizer(TEXTS[0]).input_ids
    expected = alone(ids, max_tokens=200, sampling=SAMPLED, ignore_eos=True)
    engine = start(mode="auto")
    engine._worker._lone_runs_single = True
    if engine._worker.batch is None:
        pytest.fail("four sequences in one pass cost more than four passes on this model")
    first, second = Listener(), Listener()
    submit_one(engine, first, prompt_ids=ids, max_tokens=200, sampling=SAMPLED, ignore_eos=True)
    heard = [first.next(), first.next()]
    assert engine._worker._single.decoding is not None
    submit_one(engine, second, prompt_ids=[9, 8], max_tokens=4, sampling=GREEDY, ignore_eos=True)
    second.until_end()
    assert engine._worker._single.decoding is None
    pieces = [piece for piece in [*heard, *first.until_end()] if isinstance(piece, Piece)]
    assert [piece.token_id for piece in pieces] == expected[0]


def test_shutdown_drains_a_batch(start: Start) -> None:
    engine, listener = start(), Listener()
    engine.submit([request(max_tokens=20, ignore_eos=True)] * 3, listener)
    engine.shutdown(drain_s=60)
    ends = [listener.next() for _ in range(60)]
    assert sum(isinstance(end, Piece) and end.finish_reason == "length" for end in ends) == 3
    assert engine.state == "stopped"


def test_shutdown_at_its_deadline_cuts_a_batch_off(start: Start) -> None:
    engine, listener = start(), Listener()
    submit_one(engine, listener, max_tokens=2000, ignore_eos=True)
    listener.next()
    engine.shutdown(drain_s=0.0)
    end = listener.until_end()[-1]
    assert isinstance(end, Failure)
    assert "shutting down" in str(end.error)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"mode": "quick"}, "mode='quick': must be one of"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"scheduler": "lifo"}, "scheduler='lifo': must be one of .*'fifo'.*'moecast_overlap'"),
        ({"kv_tokens": 100}, "kv_tokens=100: must be at least the context of 2048"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(
    model: Any, tokenizer: Any, wrong: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        GenerationEngine(model=model, tokenizer=tokenizer, **wrong)


class Witness(ScriptedPredictor):
    """Writes down what it is shown of each request, by the request's prompt."""

    kind = "witness"
    moments = frozenset({"request", "token", "routed"})

    def __init__(self, spec: MoESpec) -> None:
        super().__init__(gamma=0.5)
        self.spec = spec
        self.names: dict[int, str | None] = {}
        self.seen: dict[str | None, list[tuple[int | None, int | None, Tensor]]] = {}
        self.layers: dict[str | None, list[int]] = {}

    def on_request(self, state: State, request: Request) -> Forecast:
        self.names[id(state)] = request.prompt
        self.seen[request.prompt], self.layers[request.prompt] = [], []
        self.keep = [*getattr(self, "keep", []), state]  # so that no id is given again
        flat_LE = torch.ones(self.fitted_spec().num_layers, self.fitted_spec().num_experts)
        return Forecast.stationary(flat_LE, gamma=self.gamma)

    def on_token(
        self,
        state: State,
        expert_map_LE: Tensor,
        *,
        token_id: int | None = None,
        next_token_id: int | None = None,
    ) -> Forecast:
        self.seen[self.names[id(state)]].append((token_id, next_token_id, expert_map_LE.clone()))
        return Forecast.stationary(expert_map_LE, gamma=self.gamma)

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor:
        self.layers[self.names[id(state)]].append(layer)
        return router_probs_E


def test_a_predictor_sees_each_request_of_a_batch_as_if_it_were_alone(tokenizer: Any) -> None:
    """Tokens of several requests lie in one row of a pass; each must reach its own past."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()
    told = []
    for mode in ("single", "batched"):
        witness = Witness(spec_of(model))
        with attach(model, policy="forecast", slots=12, predictor=witness) as offload:
            engine = GenerationEngine(
                model=model, tokenizer=tokenizer, offload=offload, mode=mode, max_batch=3
            )
            engine.start()
            listeners = [Listener() for _ in TEXTS[:6]]
            for i, (text, listener) in enumerate(zip(TEXTS, listeners, strict=False)):
                ids = tokenizer(text).input_ids
                submit_one(
                    engine,
                    listener,
                    prompt_ids=ids,
                    prompt_text=text,
                    max_tokens=4 + 2 * i,
                    sampling=GREEDY,
                    ignore_eos=True,
                )
            spoken = answers(listeners)
            engine.shutdown()
        told.append((spoken, witness))
    (alone_said, alone_saw), (together_said, together_saw) = told
    assert together_said == alone_said
    for text in TEXTS[:6]:
        ours, theirs = together_saw.seen[text], alone_saw.seen[text]
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        assert len(ours) > 4
        for (_, _, mine), (_, _, other) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
        assert together_saw.layers[text] == alone_saw.layers[text]


def test_logits_of_a_batch_are_those_of_one(model: Any) -> None:
    """The margin that equal tokens rest on: float32 noise, far below a token's lead."""
    with torch.inference_mode():
        one = model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
        two = model(torch.tensor([[5, 6, 7, 8], [9, 9, 9, 9]])).logits[0, -1]
    assert float((one - two).abs().max()) < 1e-3
