"""Forecasts from within captured steps are the host's, made in time, and of no other's past."""

import copy
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.adapters import moe_layers, spec_of
from data.schema import TraceList
from predictors.base import Forecast
from predictors.forecaster import Forecaster
from predictors.forecaster_graph import ForecasterGraph
from predictors.graph import GraphPredictor
from predictors.request_history import RequestHistory
from runtime.backend import CpuBackend
from runtime.decode_graph import DecodeGraph
from runtime.engine import attach
from runtime.forecasts import FALLBACK_POLICY
from runtime.gpu_experts import GpuExperts
from runtime.graph_forecasts import GraphForecasts, device_bytes, graph_module
from runtime.offload import Offload
from runtime.simulate import replay_log
from tests.devices import KERNEL_DEVICE
from tests.families import FAMILIES, tiny_model
from tests.predictors.graph_fakes import Habit, HabitGraph
from tests.runtime.graph_fakes import TapeRecorder
from tests.runtime.kernel_attach import SLOTS, attach_as_device, attach_kernels
from tests.runtime.routing_recorder import RoutingRecorder, trace_set

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OTHER = [2, 7, 1, 8, 2, 8, 1, 8]
NEW_TOKENS = 7
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def habit(model: Any) -> Habit:
    return habit_for(model)


def habit_for(model: Any) -> Habit:
    predictor = Habit()
    predictor.load_state(spec_of(model), {})
    return predictor


def generate(model: Any, rows: list[list[int]] | None = None, num_new: int = NEW_TOKENS) -> Tensor:
    """Greedy, from prompts that are padded on the left."""
    rows = rows or [PROMPT]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    ids: Tensor = model.generate(
        ids_BT,
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
    )
    return ids.cpu()


class Replayed:
    """The stock model under a decode graph whose replays run no Python, and what it was told."""

    def __init__(self, model: Any, predictor: Habit | Forecaster) -> None:
        model.set_experts_implementation("batched_mm")
        spec = spec_of(model)
        self.layers = moe_layers(model)
        self.said_LE = torch.zeros(spec.num_layers, spec.num_experts)
        self.later_LE = torch.zeros_like(self.said_LE)
        self.log: list[tuple[Tensor, Tensor]] = []  # after each pass: the forecast, each layer's
        self.errors: list[Exception] = []
        self.num_passes = 0
        self.forecasts = GraphForecasts(
            model=model,
            layers=self.layers,
            predictor=predictor,
            module=graph_module(predictor, 1),
            device=torch.device("cpu"),
            on_forecast=self._hear,
            on_later=self._hear_later,
            later_use=self.later_LE.__getitem__,
            on_pass=self._count,
            on_failure=self.errors.append,
            on_change=lambda: self.graph.forget(),
        )
        for moe in self.layers:  # stands for what an attached model's experts function tells
            moe.router.register_forward_hook(self._routed(moe.layer))
        self.graph = DecodeGraph(
            model,
            recorder=TapeRecorder(self._state),
            max_batch=4,
            hold=self.forecasts.why_not_captured,
        )
        model.register_forward_hook(
            lambda *_: self.log.append((self.said_LE.clone(), self.later_LE.clone()))
        )

    def _state(self) -> list[Tensor]:
        batches = self.forecasts._batches.values()
        state = [self.said_LE, self.later_LE]
        state += [buffer for batch in batches for buffer in batch.module.buffers()]
        return state + [ids_B for batch in batches for ids_B in (batch.ids_B, batch.next_ids_B)]

    def _hear(self, forecast: Forecast) -> None:
        self.said_LE.copy_(forecast.forecast_LE)

    def _hear_later(self, layer: int, later_E: Tensor) -> None:
        assert later_E.data_ptr() == self.later_LE[layer].data_ptr(), "written where it is read"

    def _count(self, age_tokens: int) -> None:
        assert age_tokens == 0
        self.num_passes += 1

    def _routed(self, layer: int) -> Any:
        def tell(router: nn.Module, args: Any, output: Any) -> None:
            self.forecasts.routed(layer, output[2], output[1])

        return tell


def compare(replayed: Replayed, predictor: Any, traces: list[Any], *, first_pass: int) -> None:
    """Each pass's forecast with the mean of those of the rows' walks."""
    walks = [predictor.walk(trace) for trace in traces]
    num_prompt = traces[0].num_prompt_tokens
    begun_LE = torch.stack([walk.forecasts[0].forecast_LE for walk in walks]).mean(0)
    log = replayed.log[first_pass : first_pass + NEW_TOKENS]
    torch.testing.assert_close(log[0][0], begun_LE, **CLOSE)
    for step, (said_LE, later_LE) in enumerate(log[1:]):
        t = num_prompt + step
        expected_LE = torch.stack([walk.forecasts[t].forecast_LE for walk in walks]).mean(0)
        torch.testing.assert_close(said_LE, expected_LE, **CLOSE)
        expected_LE = torch.stack([walk.later_TLE[t] for walk in walks]).mean(0)
        torch.testing.assert_close(later_LE, expected_LE, **CLOSE)


class WithoutKernels(Forecaster):
    """Its kernels run interpreted here, which a tape cannot record."""

    def graph_module(self, *, batch_size: int, **options: Any) -> ForecasterGraph:
        return super().graph_module(batch_size=batch_size, kernels=False)


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    """Fitted on what the model itself says, for a few seconds."""
    model = tiny_model("qwen3_moe")
    recorder = RoutingRecorder(model)
    ids_BP = generate(model, [PROMPT, OTHER, PROMPT[::-1]], num_new=24)
    traces = recorder.traces(ids_BP, num_prompt=len(PROMPT))
    predictor = WithoutKernels(
        hidden_dim=16, epochs=2, batch_size=32, trainer={"accelerator": "cpu"}
    )
    split = {str(row): "fit" for row in range(len(traces))}
    spec = spec_of(model)
    predictor.fit(TraceList(spec=spec, traces=traces, split=split, digest="", probs_kind="softmax"))
    return predictor


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, OTHER, PROMPT[::-1], OTHER[::-1]]])
@pytest.mark.parametrize("kind", ["habit", "forecaster"])
def test_replayed_steps_forecast_what_the_host_does_from_the_recorded_routing(
    model: Any, kind: str, rows: list[list[int]], forecaster: Forecaster
) -> None:
    """Two requests: the second begins anew, and replays the steps that the first had captured."""
    predictor: Any = forecaster if kind == "forecaster" else habit_for(model)
    expected = generate(model, rows)
    recorder = RoutingRecorder(model)
    stock_ids = [generate(model, rows), generate(model, rows[::-1])]
    passes = recorder._passes
    assert torch.equal(stock_ids[0], expected)
    half = len(passes) // 2
    requests = []
    for number, ids_BP in enumerate(stock_ids):
        recorder._passes = passes[number * half : (number + 1) * half]
        requests.append(recorder.traces(ids_BP, num_prompt=len(PROMPT)))
    replayed = Replayed(model, predictor)
    assert torch.equal(generate(model, rows), stock_ids[0])
    assert torch.equal(generate(model, rows[::-1]), stock_ids[1])
    assert not replayed.errors
    assert replayed.graph._captures == 1
    assert replayed.graph._replays == 2 * (NEW_TOKENS - 1) - 1
    assert replayed.num_passes == len(replayed.log) == 2 * NEW_TOKENS
    compare(replayed, predictor, requests[0], first_pass=0)
    compare(replayed, predictor, requests[1], first_pass=NEW_TOKENS)


def test_padded_rows_are_told_their_own_prompts(model: Any, habit: Habit) -> None:
    rows = [PROMPT, PROMPT[:3], PROMPT[-1:]]
    alone = [Replayed(tiny_model("qwen3_moe"), habit) for _ in rows]
    for replayed, row in zip(alone, rows, strict=True):
        generate(replayed.graph._model, [row], num_new=4)
    together = Replayed(model, habit)
    generate(model, rows, num_new=4)
    for step in range(4):
        mean_LE = torch.stack([replayed.log[step][0] for replayed in alone]).mean(0)
        torch.testing.assert_close(together.log[step][0], mean_LE, **CLOSE)
    assert not together.errors


def test_a_prompt_in_chunks_is_a_prompt(model: Any, habit: Habit) -> None:
    long = [(7 * n) % 31 + 1 for n in range(17)]
    logs = []
    for chunk_tokens in (None, 8):
        fresh = tiny_model("qwen3_moe")
        fresh.generation_config.prefill_chunk_size = chunk_tokens
        replayed = Replayed(fresh, habit)
        generate(fresh, [long, long[::-1]], num_new=4)
        logs.append([said_LE for said_LE, _ in replayed.log])
        assert not replayed.errors
    whole, chunked = logs
    # Chunks of 8, 8 and 1: between them the predictor has looked ahead, too.
    assert len(chunked) == len(whole) + 2
    for left, right in zip(whole[1:], chunked[3:], strict=True):
        torch.testing.assert_close(left, right, **CLOSE)
    assert not torch.equal(chunked[1], chunked[0])


def test_a_cache_that_its_caller_goes_on_with_is_a_prompt_anew(model: Any, habit: Habit) -> None:
    replayed = Replayed(model, habit)
    ids_BT = torch.tensor([PROMPT])
    kept = model.generate(
        ids_BT, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, max_cache_len=32
    )
    cache, said = kept.past_key_values, kept.sequences
    turn_BT = torch.cat([said, torch.tensor([OTHER])], 1)
    model.generate(turn_BT, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert not replayed.errors
    assert not replayed.log[4][0].any(), "the turn's own pass begins with nothing"
    assert replayed.log[5][0].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_stock_model(family: str) -> None:
    model = tiny_model(family)
    predictor = habit_for(model)
    rows = [PROMPT, PROMPT[2:]]
    stock = generate(model, rows)
    slots = spec_of(model).num_experts // 2
    with attach_as_device(
        model, slots=slots, policy="forecast", predictor=predictor, graph=True
    ) as offload:
        assert torch.equal(generate(model, rows), stock)
        stats = offload.stats()
    assert (stats.predictor, stats.predictor_failed) == ("habit", False)
    assert stats.graph_replays == NEW_TOKENS - 2
    assert stats.forecasts_used == NEW_TOKENS
    assert stats.forecast_age_tokens == 0
    assert torch.equal(generate(model, rows), stock)


@pytest.mark.parametrize("policy", ["forecast", "finemoe"])
def test_what_is_hit_is_what_a_replay_of_the_recorded_routing_hits(
    policy: str,
) -> None:
    """Two requests in turn; the simulator walks the predictor along their traces."""
    model = tiny_model("qwen3_moe", num_hidden_layers=2)
    habit = habit_for(model)
    stock = generate(model, num_new=5)
    traces, recorder = [], RoutingRecorder(model)
    replays = KERNEL_DEVICE == "cpu"  # what a CUDA graph replays, no hook of the recorder's sees
    with attach_kernels(model, policy=policy, predictor=habit, graph=replays) as offload:
        for row in (PROMPT, OTHER):
            ids_1P = generate(model, [row], num_new=5)
            assert row is OTHER or torch.equal(ids_1P, stock)
            traces += recorder.traces(ids_1P, num_prompt=len(row))
            recorder.forget()
        stats = offload.stats()
        backend = offload._backend
        assert isinstance(backend, GpuExperts)
        backend.cache.check_integrity()
    log = replay_log(trace_set(traces, offload.spec), policy=policy, slots=SLOTS, predictor=habit)
    kinds = [event.kind for event in log]
    counted = (stats.hits, stats.misses, stats.evictions)
    assert counted == (kinds.count("hit"), kinds.count("miss"), kinds.count("evict"))
    plain = replay_log(trace_set(traces, offload.spec), policy="lru", slots=SLOTS)
    assert [event.kind for event in plain].count("hit") != stats.hits


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_expected_is_written_only_where_a_backend_has_made_room(
    model: Any, habit: Habit, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefetch that is being decided on might still read there."""
    events: list[tuple[str, int | None, int]] = []  # and how often was written there by then
    place, expect = CpuBackend.later_use, CpuBackend.expect

    def note(backend: CpuBackend, kind: str, layer: int | None) -> None:
        events.append((kind, layer, backend.later_use_LE._version))

    def make_room(backend: CpuBackend, layer: int | None = None) -> Tensor:
        if not events or events[-1][0] != "told":  # `expect` asks itself
            note(backend, "room", layer)
        return place(backend, layer)

    def hear(backend: CpuBackend, later_LE: Tensor, layer: int | None = None) -> None:
        note(backend, "told", layer)
        expect(backend, later_LE, layer)
        note(backend, "done", layer)

    monkeypatch.setattr(CpuBackend, "later_use", make_room)
    monkeypatch.setattr(CpuBackend, "expect", hear)
    with (
        attach_as_device(model, policy="forecast", predictor=habit, graph=False)
        if inside
        else attach(model, slots=SLOTS, policy="forecast", predictor=habit)
    ) as offload:
        generate(model)
    for (before, of_layer, count), (kind, layer, new_count) in itertools.pairwise(events):
        if before == "done":
            assert new_count == count
        elif before == "room":
            assert (kind, layer) == ("told", of_layer)
    told = {layer for kind, layer, _ in events if kind == "told"}
    assert told == {None, *range(offload.spec.num_layers)}


class Broken(Habit):
    """Fails in the fourth token that it is shown."""

    def graph_module(self, *, batch_size: int, **options: Any) -> GraphPredictor:
        return BrokenGraph(batch_size, self.fitted_spec())


class BrokenGraph(HabitGraph):
    num_told = 0

    def on_routed(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        self.num_told += 1
        if self.num_told == 5:  # layer 1 of the first step: the prompt's last token has 3
            raise ZeroDivisionError("nobody has thought of this")
        return super().on_routed(layer, *args, **kwargs)


def test_a_predictor_that_fails_is_switched_off_and_nobody_else_notices(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Broken()
    predictor.load_state(spec_of(model), {})
    stock = generate(model)
    with attach_as_device(model, policy="forecast", predictor=predictor, graph=True) as offload:
        assert torch.equal(generate(model), stock)
        assert torch.equal(generate(model), stock)
        stats, backend = offload.stats(), offload._backend
        assert isinstance(backend, CpuBackend)
        assert backend._cache.policy.name == FALLBACK_POLICY
        assert backend._cache.usage.use_count_LE.any(), "which counts from then on"
    assert stats.predictor_failed
    assert stats.forecasts_used == 2, "the prompt's pass and the one that it failed in"
    assert stats.graph_replays > NEW_TOKENS, "steps are captured without it"
    assert caplog.text.count("Predictor habit has failed and is switched off") == 1
    assert "nobody has thought of this" in caplog.text


class Remembering(Habit):
    """On a host it would go by the requests before; ``inside`` a graph it cannot."""

    inside = True

    def with_history(self, history: RequestHistory) -> "Remembering":
        return copy.copy(self)

    def graph_module(self, *, batch_size: int, **options: Any) -> Any:
        return super().graph_module(batch_size=batch_size) if self.inside else None


@pytest.mark.parametrize(
    ("kind", "inside", "forgets"),
    [(Remembering, True, True), (Remembering, False, False), (Habit, True, False)],
)
def test_who_cannot_follow_finished_requests_inside_a_graph_says_so(
    model: Any, kind: type[Habit], inside: bool, forgets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = kind()
    predictor.inside = inside  # type: ignore[attr-defined]
    predictor.load_state(spec_of(model), {})
    with attach_as_device(model, policy="forecast", predictor=predictor, graph=True) as offload:
        generate(model)
        assert offload.stats().predictor_forgets is forgets
    assert caplog.text.count("does not follow finished requests") == int(forgets)


def test_one_module_is_made_for_each_batch_size(
    model: Any, habit: Habit, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = habit.graph_module

    def counted(*, batch_size: int, **options: Any) -> GraphPredictor:
        made.append(batch_size)
        return make(batch_size=batch_size)

    monkeypatch.setattr(habit, "graph_module", counted)
    with attach_as_device(model, policy="forecast", predictor=habit, graph=True):
        assert made == [1]
        for rows in ([PROMPT], [PROMPT, OTHER], [PROMPT]):
            generate(model, rows, num_new=3)
    assert made == [1, 2]


def test_what_it_takes_of_the_device_is_counted(forecaster: Forecaster) -> None:
    module = forecaster.graph_module(batch_size=1)
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert device_bytes(forecaster) > held


def test_modules_of_other_batch_sizes_hold_nothing_of_their_own_but_their_rows(
    model: Any, forecaster: Forecaster
) -> None:
    replayed = Replayed(model, forecaster)
    generate(model, [PROMPT, OTHER], num_new=3)
    one, two = (replayed.forecasts._batches[rows].module for rows in (1, 2))
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert pairs
    assert all(left.data_ptr() == right.data_ptr() for left, right in pairs)
    buffers = {
        name: left.data_ptr() == right.data_ptr()
        for (name, left), right in zip(one.named_buffers(), two.buffers(), strict=True)
    }
    big = ["take_LNQJ", "mix_LNIJ", "own_LNJ", "pass_on_LNIQ", "follow_MWW", "token_ids_V"]
    assert all(buffers[name] for name in big)
    of_rows = [name for name in buffers if "B" in name.rpartition("_")[2]]
    assert of_rows
    assert not any(buffers[name] for name in (*of_rows, "answers_SE", "share_G"))
    two_shares, one_shares = two.get_buffer("share_G"), one.get_buffer("share_G")
    torch.testing.assert_close(2 * two_shares, one_shares)


def test_batch_sizes_in_turn_forecast_what_each_forecasts_alone(
    model: Any, forecaster: Forecaster
) -> None:
    """What modules share is written to by each in turn."""
    rows = [[PROMPT], [PROMPT, OTHER], [OTHER], [OTHER, PROMPT]]
    alone = []
    for row in rows:
        fresh = tiny_model("qwen3_moe")
        replayed = Replayed(fresh, forecaster)
        generate(fresh, row, num_new=5)
        alone += replayed.log
    replayed = Replayed(model, forecaster)
    for row in rows:
        generate(model, row, num_new=5)
    assert not replayed.errors
    assert len(replayed.log) == len(alone)
    for number, (said, expected) in enumerate(zip(replayed.log, alone, strict=True)):
        torch.testing.assert_close(said[0], expected[0], **CLOSE)
        if number % 5:  # a prompt's pass says nothing of each layer
            torch.testing.assert_close(said[1], expected[1], **CLOSE)


def test_of_many_batch_sizes_the_latest_are_kept_and_steps_over_the_others_are_captured_anew(
    model: Any, habit: Habit
) -> None:
    replayed = Replayed(model, habit)
    sizes = (1, 2, 3, 4)
    for size in sizes:
        generate(model, [PROMPT] * size, num_new=4)
    assert list(replayed.forecasts._batches) == list(sizes)
    first = [said for said, _ in replayed.log[:4]]
    captures, gone = replayed.graph._captures, weakref.ref(replayed.forecasts._batches[1].module)
    generate(model, [PROMPT] * 5, num_new=4)
    assert list(replayed.forecasts._batches) == [2, 3, 4, 5]
    assert gone() is None
    assert not replayed.graph._steps, "none of what was captured over it is left"
    replayed.log.clear()
    generate(model, [PROMPT], num_new=4)
    assert replayed.graph._captures == captures + 1
    for (said, _), expected in zip(replayed.log, first, strict=True):
        torch.testing.assert_close(said, expected, **CLOSE)
    assert not replayed.errors


def test_detaching_leaves_no_hook(model: Any, habit: Habit) -> None:
    def hooks() -> Iterator[int]:
        return (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = list(hooks())
    offload: Offload = attach_as_device(model, policy="forecast", predictor=habit, graph=True)
    assert list(hooks()) != before
    offload.detach()
    assert list(hooks()) == before
