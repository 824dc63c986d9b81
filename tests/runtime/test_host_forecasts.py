"""A predictor on a thread of its own: whatever it does, no forward pass waits for it."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from data.schema import TraceList
from predictors.base import Forecast, Request, State
from predictors.finemoe import FineMoE
from predictors.previous_token import PreviousToken
from predictors.request_history import RequestHistory
from runtime.backend import CpuBackend
from runtime.engine import attach
from runtime.forecast_inbox import ForecastInbox
from runtime.forecasts import FALLBACK_POLICY
from runtime.host_forecasts import HostForecasts
from tests.devices import KERNEL_DEVICE
from tests.families import tiny_model
from tests.predictors.graph_fakes import Habit
from tests.runtime.kernel_attach import attach_as_device
from tests.runtime.routing_recorder import RoutingRecorder

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OTHER = [2, 7, 1, 8]
NEW_TOKENS = 6
PATIENCE_S = 60.0
DEVICE = torch.device(KERNEL_DEVICE)


class HostHabit(Habit):
    """As `Habit`, but not to be had for a graph; waits where a test says so, and writes down."""

    kind = "host_habit"
    moments = frozenset({"request", "token"})

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_asked = threading.Event()
        self.fails_at: int | None = None
        self.error: BaseException = ZeroDivisionError("nobody has thought of this")
        self.prompts: list[str | None] = []
        self.tokens: list[tuple[int, int | None, int | None]] = []
        self.states: list[State] = []

    def graph_module(self, *, batch_size: int, **options: Any) -> None:
        return None

    def on_request(self, state: State, request: Request) -> Forecast | None:
        self.is_asked.set()
        assert self.may_go_on.wait(PATIENCE_S)
        self.prompts.append(request.prompt)
        self.states.append(state)
        return super().on_request(state, request)

    def on_token(self, state: State, expert_map_LE: Tensor, **ids: Any) -> Forecast | None:
        assert self.may_go_on.wait(PATIENCE_S)
        assert not expert_map_LE.requires_grad
        (number,) = [n for n, known in enumerate(self.states) if known is state]
        self.tokens.append((number, ids["token_id"], ids["next_token_id"]))
        if len(self.tokens) == self.fails_at:
            raise self.error
        return super().on_token(state, expert_map_LE, **ids)


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def habit(model: Any) -> HostHabit:
    predictor = HostHabit()
    predictor.load_state(spec_of(model), {})
    return predictor


def generate(model: Any, rows: list[list[int]] | None = None, num_new: int = NEW_TOKENS) -> Tensor:
    rows = rows or [PROMPT]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    ids: Tensor = model.generate(
        ids_BT,
        attention_mask=(ids_BT != 0).long(),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
    )
    return ids.cpu()


def wait_until(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.001)


def asked(habit: HostHabit) -> None:
    """The thread has taken the first pass, and no other, when it comes to a halt."""
    assert habit.is_asked.wait(PATIENCE_S)


def settle(forecasts: Any) -> None:
    """Until the thread has dealt with everything and waits for more."""
    assert isinstance(forecasts, HostForecasts)
    wait_until(lambda: forecasts.num_shown + forecasts.num_stale == forecasts.num_published)


class Watched:
    """A model on the device of tests, watched by `HostForecasts`."""

    def __init__(self, model: Any, predictor: Any, **options: Any) -> None:
        self.heard: list[Forecast] = []
        self.ages: list[int] = []
        self.errors: list[Exception] = []
        self.model = model.to(DEVICE)
        self.forecasts = HostForecasts(
            model=model,
            layers=moe_layers(model),
            predictor=predictor,
            device=DEVICE,
            on_forecast=lambda said: self.heard.append(
                Forecast(*(part.cpu().clone() for part in said))
            ),
            on_pass=self.ages.append,
            on_failure=self.errors.append,
            **options,
        )

    def settle(self) -> None:
        settle(self.forecasts)


def test_a_search_that_never_ends_holds_up_no_token(model: Any, habit: HostHabit) -> None:
    """What sleeps for 200 ms, or for ever, is not waited for: no pass could end otherwise."""
    stock = [generate(model), generate(model, [OTHER])]
    habit.may_go_on.clear()
    with attach_as_device(model, policy="forecast", predictor=habit, graph=True) as offload:
        assert torch.equal(generate(model), stock[0])
        assert torch.equal(generate(model, [OTHER]), stock[1])
        assert habit.tokens == []
        stats = offload.stats()
        assert stats.forecasts_used == 0
        assert stats.graph_replays > NEW_TOKENS
        habit.may_go_on.set()


def test_a_search_that_never_ends_holds_up_no_other_predictor(
    model: Any, habit: HostHabit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swaps is on the model's thread, where requests wait; only who detaches has time."""
    monkeypatch.setattr("runtime.offload._CLOSE_S", 0.2)
    other = HostHabit()
    other.load_state(spec_of(model), {})
    habit.may_go_on.clear()
    with attach_as_device(model, policy="forecast", predictor=habit, graph=True) as offload:
        generate(model)
        asked(habit)
        assert offload._predictor is not None
        old = offload._predictor.observer
        offload.swap_predictor(other)
        assert isinstance(old, HostForecasts)
        assert not old.join(0.0)
        generate(model)
        settle(offload._predictor.observer)
        assert other.prompts
    assert "A predictor is still at work after 0 s" in caplog.text
    habit.may_go_on.set()
    assert old.join(PATIENCE_S)


def test_no_call_of_the_models_thread_waits_for_the_predictors(
    model: Any, habit: HostHabit, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    here = threading.get_ident()
    for kind, name in (
        (threading.Thread, "join"),
        (threading.Event, "wait"),
        (threading.Condition, "wait"),
    ):
        stock = getattr(kind, name)

        def told(self: Any, *args: Any, _stock: Any = stock, _name: str = name, **kw: Any) -> Any:
            if threading.get_ident() == here:
                waits.append(_name)
            return _stock(self, *args, **kw)

        monkeypatch.setattr(kind, name, told)
    watched = Watched(model, habit)
    waits.clear()  # a thread's start waits for the thread to have begun
    generate(model)
    assert waits == []
    watched.forecasts.remove()
    assert waits == []
    assert watched.forecasts.join(PATIENCE_S)
    assert "join" in waits


def test_the_thread_is_shown_what_an_observer_on_the_cpu_is_shown(
    model: Any, habit: HostHabit
) -> None:
    rows = [PROMPT, OTHER]
    ids_BP = generate(model, rows)
    with attach(model, slots=5, policy="forecast", predictor=habit):
        generate(model, rows)
        generate(model, [OTHER])
    expected, habit.tokens, habit.states = habit.tokens, [], []
    watched = Watched(model, habit)
    assert torch.equal(generate(model, rows), ids_BP)
    watched.settle()
    generate(model, [OTHER])
    watched.settle()
    watched.forecasts.remove()
    assert not watched.errors
    assert watched.forecasts.num_stale == watched.forecasts.num_shed == 0
    assert habit.tokens == expected
    assert {row for row, _, _ in expected} == {0, 1, 2}


def test_forecasts_are_those_of_the_recorded_routing_and_their_age_is_counted(
    model: Any, habit: HostHabit
) -> None:
    """With a thread that keeps up, each pass goes by what was known one pass before it."""
    recorder = RoutingRecorder(model)
    watched = Watched(model, habit)
    model.register_forward_hook(lambda *_: watched.settle_after_pass())
    shown: list[int] = []

    def settle_after_pass() -> None:
        wait_until(lambda: watched.forecasts._inbox._posted is not None)
        shown.append(len(habit.tokens))

    watched.settle_after_pass = settle_after_pass  # type: ignore[attr-defined]
    ids_1P = generate(model)
    (trace,) = recorder.traces(ids_1P, num_prompt=len(PROMPT))
    walked = habit.walk(trace).forecasts
    # The second pass finds what was said of the prompt alone, the third what followed its tokens.
    known = [0, *range(len(PROMPT), len(PROMPT) + NEW_TOKENS - 2)]
    assert len(watched.heard) == len(known) == NEW_TOKENS - 1
    for heard, t in zip(watched.heard, known, strict=True):
        torch.testing.assert_close(heard.forecast_LE, walked[t].forecast_LE, rtol=1e-4, atol=1e-5)
    assert watched.ages == [len(PROMPT), *[1] * (NEW_TOKENS - 2)]
    watched.forecasts.remove()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("nobody has thought of this"), "nobody has thought of this"),
        (SystemExit(), "its thread was broken off: SystemExit"),
    ],
    ids=["fails", "killed"],
)
def test_a_predictor_that_fails_is_switched_off_and_nobody_else_notices(
    model: Any,
    habit: HostHabit,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    said: str,
) -> None:
    stock = generate(model)
    habit.fails_at, habit.error = len(PROMPT), error
    with attach_as_device(model, policy="forecast", predictor=habit, graph=True) as offload:
        assert torch.equal(generate(model), stock)
        wait_until(lambda: offload._predictor.observer._error is not None)
        assert torch.equal(generate(model), stock)
        stats = offload.stats()
    assert stats.predictor_failed
    assert caplog.text.count("Predictor host_habit has failed and is switched off") == 1
    assert said in caplog.text


def test_on_the_cpu_a_predictor_that_fails_is_switched_off_too(
    model: Any, habit: HostHabit, caplog: pytest.LogCaptureFixture
) -> None:
    stock = generate(model)
    habit.fails_at = len(PROMPT) + 2
    with attach(model, slots=5, policy="forecast", predictor=habit) as offload:
        assert torch.equal(generate(model), stock)
        stats, backend = offload.stats(), offload._backend
        assert isinstance(backend, CpuBackend)
        assert backend._cache.policy.name == FALLBACK_POLICY
    assert stats.predictor_failed
    assert stats.predictor == "host_habit"
    # The prompt's forecast and one step's: what is said in the next step is the error.
    assert stats.forecasts_used == 3
    assert caplog.text.count("Predictor host_habit has failed and is switched off") == 1


def test_a_backlog_is_bounded_and_what_is_shed_is_counted(
    model: Any, habit: HostHabit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    habit.may_go_on.clear()
    watched = Watched(model, habit, max_backlog=2)
    model.register_forward_hook(lambda *_: asked(habit))
    generate(model)
    assert watched.forecasts.num_shed == NEW_TOKENS - 3, "one is searched for, two wait"
    assert caplog.text.count("does not keep up: 2 passes wait") == 1
    habit.may_go_on.set()
    watched.settle()
    generate(model, [OTHER])
    watched.settle()
    watched.forecasts.remove()
    watched.forecasts.remove()
    num_shed = watched.forecasts.num_shed
    assert caplog.text.count(f"and {num_shed} more were never put before it") == 1
    assert not watched.errors
    for _, token, after in habit.tokens:  # no map is shown with another token's ids
        assert token is not None
        assert after is not None


def test_what_a_predictor_was_not_shown_stands_in_the_offloads_stats(
    model: Any, habit: HostHabit
) -> None:
    with attach_as_device(model, policy="forecast", predictor=habit) as offload:
        generate(model)
        assert offload._predictor is not None
        forecasts = offload._predictor.observer
        assert isinstance(forecasts, HostForecasts)
        settle(forecasts)
        assert (offload.stats().passes_shed, offload.stats().passes_stale) == (0, 0)
        forecasts.num_shed, forecasts.num_stale = 3, 5
        assert (offload.stats().passes_shed, offload.stats().passes_stale) == (3, 5)


def test_a_request_that_is_over_is_not_searched_for_any_more(model: Any, habit: HostHabit) -> None:
    habit.may_go_on.clear()
    watched = Watched(model, habit)
    model.register_forward_hook(lambda *_: asked(habit))
    generate(model)
    watched.forecasts.begin_request("what the user wrote")
    generate(model, [OTHER], num_new=2)
    habit.may_go_on.set()
    wait_until(lambda: "what the user wrote" in habit.prompts)
    watched.settle()
    watched.forecasts.remove()
    assert watched.forecasts.num_stale == NEW_TOKENS - 1
    assert habit.prompts[-1] == "what the user wrote"


def test_who_remembers_requests_is_shown_each_to_its_end(model: Any) -> None:
    class Remembering(HostHabit):
        def with_history(self, history: RequestHistory) -> "Remembering":
            self.history = history
            view = Remembering()
            view.spec, view.seen, view.history = self.spec, self.seen, history
            return view

        def on_request(self, state: State, request: Request) -> Forecast | None:
            self.seen.append(self.history.num_finished)
            return super().on_request(state, request)

    predictor = Remembering()
    predictor.spec, predictor.seen = spec_of(model), []
    watched = Watched(model, predictor)
    for row in (PROMPT, OTHER, PROMPT):
        generate(model, [row], num_new=2)
    wait_until(lambda: len(predictor.seen) == 3)
    watched.forecasts.remove()
    assert predictor.seen == [0, 1, 2]


@pytest.mark.parametrize("kind", ["finemoe", "previous_token"])
def test_the_predictors_of_the_papers_run_on_it(model: Any, kind: str) -> None:
    recorder = RoutingRecorder(model)
    stock = generate(model)
    traces = recorder.traces(stock, num_prompt=len(PROMPT))
    predictor: Any = FineMoE(prefetch_distance=1) if kind == "finemoe" else PreviousToken()
    split = {trace.request_id: "fit" for trace in traces}
    spec = spec_of(model)
    predictor.fit(TraceList(spec=spec, traces=traces, split=split, digest="", probs_kind="softmax"))
    policy = "finemoe" if kind == "finemoe" else "forecast"
    with attach_as_device(model, policy=policy, predictor=predictor, graph=True) as offload:
        for _ in range(2):
            assert torch.equal(generate(model), stock)
            settle(offload._predictor.observer)
        stats = offload.stats()
    assert not stats.predictor_failed
    assert stats.forecasts_used > 0
    assert stats.forecast_age_tokens >= stats.forecasts_used


def test_naming_more_prompts_than_rows_is_refused(model: Any, habit: HostHabit) -> None:
    with attach_as_device(model, policy="forecast", predictor=habit) as offload:
        offload.begin_request("one", "two")
        with pytest.raises(ValueError, match="named 2 prompts.*1 rows"):
            generate(model)


def test_an_inbox_gives_what_was_posted_last_and_each_only_once() -> None:
    inbox = ForecastInbox(2, 3, DEVICE)
    assert not inbox.take()
    assert inbox.known_tokens is None
    place = inbox.forecast.forecast_LE
    for known in range(5):
        said_LE = torch.full((2, 3), float(known))
        inbox.post(Forecast(said_LE, 2 * said_LE), known)
        if known % 2:
            assert inbox.take()
            assert not inbox.take()
            assert inbox.known_tokens == known
            assert torch.equal(inbox.forecast.forecast_LE.cpu(), 2 * said_LE)
    assert inbox.forecast.forecast_LE is place
