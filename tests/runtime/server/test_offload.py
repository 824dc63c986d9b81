"""Served with a quarter of the experts resident, a model says what it says with all of them."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from data.adapters import spec_of
from data.schema import MoESpec
from data.tiny_moe import TINY_MOE_DIR
from predictors.base import Forecast, Request, State
from predictors.request_history import RequestHistory
from runtime.engine import attach
from runtime.offload import Offload
from runtime.server.app import create_app
from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from tests.fakes import ScriptedPredictor
from tests.families import FAMILIES, tiny_model
from tests.runtime.server.fakes import WAIT_S, generate, samples, wait_until

ASKS: list[dict[str, Any]] = [
    {"prompt": "The weather in", "temperature": 0, "max_tokens": 16},
    {"prompt": "def add(a, b):", "temperature": 0.8, "seed": 1, "max_tokens": 16},
    {"prompt": "Dear customer", "temperature": 1.0, "top_p": 0.9, "seed": 2, "n": 2},
]


class Prophet(ScriptedPredictor):
    """Remembers the prompts that it was shown, and expects every expert alike."""

    kind = "prophet"
    moments = frozenset({"request"})

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        self.prompts: list[str | None] = []

    def on_request(self, state: State, request: Request) -> Forecast:
        self.prompts.append(request.prompt)
        flat_LE = torch.ones(self.fitted_spec().num_layers, self.fitted_spec().num_experts)
        return Forecast.stationary(flat_LE, gamma=self.gamma)


@pytest.fixture
def own_model() -> Any:
    """The embedded model, not shared with other tests: its experts are taken away."""
    return AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32).eval()


def serve(model: Any, tokenizer: Any, offload: Offload | None) -> Iterator[TestClient]:
    engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=offload)
    with TestClient(create_app(engine, model_name="tiny")) as client:
        wait_until(lambda: engine.state == "ready")
        yield client


def ask_all(client: TestClient) -> list[str]:
    texts = []
    for ask in ASKS:
        reply = client.post("/v1/completions", json={"model": "tiny", **ask}).json()
        texts += [choice["text"] for choice in reply["choices"]]
    return texts


def test_answers_equal_those_of_the_resident_model(
    model: Any, own_model: Any, tokenizer: Any
) -> None:
    (resident,) = [ask_all(client) for client in serve(model, tokenizer, None)]
    with attach(own_model, policy="lfru", slots=8) as offload:
        for client in serve(own_model, tokenizer, offload):
            assert ask_all(client) == resident
            stats, found = offload.stats(), samples(client)
        assert found["moecast_expert_cache_hits_total"] == stats.hits
        assert found["moecast_expert_miss_bytes_total"] == stats.miss_bytes
        assert min(stats.hits, stats.misses, stats.evictions) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_generate_in_every_family(family: str, tokenizer: Any) -> None:
    window = {"sliding_window": 16} if family == "gpt_oss" else {}
    model = tiny_model(family, **window)
    prompt_ids = list(range(5, 25))
    inputs = torch.tensor([prompt_ids])
    expected = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=30, do_sample=False
    )[0, 20:].tolist()
    with attach(model, policy="lru", slots=4) as offload:
        engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=offload)
        engine.start()
        try:
            got, _, _ = generate(
                engine,
                prompt_ids,
                max_tokens=30,
                ignore_eos=True,
                sampling=SamplingParams(temperature=0.0),
            )
        finally:
            engine.shutdown()
    assert got == expected


def test_predictors_are_shown_the_text_of_each_request(own_model: Any, tokenizer: Any) -> None:
    prophet = Prophet(spec_of(own_model))
    chat = [{"role": "user", "content": "Hello"}]
    with attach(own_model, policy="forecast", slots=8, predictor=prophet) as offload:
        for client in serve(own_model, tokenizer, offload):
            prophet.prompts.clear()  # the engine's trial pass
            short = {"model": "tiny", "max_tokens": 2}
            client.post("/v1/completions", json={**short, "prompt": "By text"})
            ids = tokenizer("By ids", add_special_tokens=False).input_ids
            client.post("/v1/completions", json={**short, "prompt": ids})
            client.post("/v1/chat/completions", json={**short, "messages": chat})
            found = samples(client)
    assert found["moecast_expert_predictor_up{predictor=prophet}"] == 1
    assert found["moecast_expert_forecasts_used_total"] > 0
    assert found["moecast_expert_forecast_age_tokens_total"] == 0
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prophet.prompts == ["By text", "By ids", rendered]


class Learner(Prophet):
    """Learns from finished requests until it is told that it may end."""

    kind = "learner"

    def __init__(self, spec: MoESpec) -> None:
        super().__init__(spec)
        self.may_end = threading.Event()
        self.num_lessons = 0
        self._history: RequestHistory | None = None
        self._teacher = self

    def with_history(self, history: RequestHistory) -> "Learner":
        view = copy.copy(self)
        view._history = history
        return view

    def _learn(self) -> None:
        self.num_lessons += 1
        assert self.may_end.wait(WAIT_S)

    def on_request(self, state: State, request: Request) -> Forecast:
        history = self._history
        assert history is not None
        if history.num_finished and history.lessons.take_one():
            history.lessons.give(self._teacher._learn)
        return super().on_request(state, request)


def test_no_request_waits_for_what_is_learned_from_others(own_model: Any, tokenizer: Any) -> None:
    """A lesson that never ends would hold up the second request, and the end of the server."""
    predictor = Learner(spec_of(own_model))
    with attach(own_model, policy="forecast", predictor=predictor, slots=12) as offload:
        for client in serve(own_model, tokenizer, offload):
            for number in range(4):
                reply = client.post(
                    "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}
                )
                assert reply.status_code == 200, number
            put_off = samples(client)["moecast_expert_predictor_lessons_put_off_total"]
        assert predictor.num_lessons == 1
        assert put_off == 2  # the third and fourth request's; the first has nothing to learn from
        predictor.may_end.set()
