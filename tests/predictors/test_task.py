from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.schema import Trace, TraceList
from predictors.base import Forecast, Request
from predictors.metrics import evaluate_recall
from predictors.popularity import Popularity
from predictors.request_history import RequestHistory
from predictors.task import Task
from tests.predictors.fakes import SPEC, make_trace, make_traces, random_traces

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "depth": 1,
    "window": 2,
    "period": 1,
    "dropout": 0.0,
    "epochs": 2,
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}


def fitted(traces: TraceList, **options: Any) -> Task:
    predictor = Task(**{**SMALL, **options})
    predictor.fit(traces)
    return predictor


def in_runs(num_requests: int, run: int) -> Iterator[Trace]:
    """Requests that use one expert for ``run`` requests, then the next expert, and so on."""
    for n in range(num_requests):
        yield make_trace(f"r{n}", [n // run % 4] * 5)


def runs(run: int = 1) -> TraceList:
    """A stream whose next request the previous ones tell exactly."""
    traces = list(in_runs(140, run))
    return make_traces({"fit": traces[:80], "val": traces[80:100], "test": traces[100:]})


def said(predictor: Task) -> Forecast:
    forecast = predictor.on_request(predictor.new_state(), Request())
    assert forecast is not None
    return forecast


def history_of(*experts: int) -> RequestHistory:
    history = RequestHistory()
    for expert in experts:
        history.add(torch.eye(4)[expert].expand(2, -1))
    return history


@pytest.mark.parametrize("options", [{}, {"start": "popularity"}, {"form": "L"}], ids=str)
def test_an_order_of_requests_is_learned_where_counting_and_popularity_are_blind(
    options: dict[str, Any],
) -> None:
    """0, 1, 2, 3, 0, ...: what was used last is what is not used next; the order tells all."""
    predictor = fitted(runs(), epochs=6, learning_rate=0.02, **options)
    following = predictor.with_history(history_of(2, 3, 0, 1))
    assert said(following).next_LE.argmax(-1).tolist() == [2, 2]
    popularity = Popularity()
    popularity.fit(runs())
    assert evaluate_recall(popularity, runs()).recall < 0.3
    assert evaluate_recall(predictor, runs()).recall > 0.9


@pytest.mark.parametrize("architecture", ["xlnet", "gpt2", "bert"])
@pytest.mark.parametrize("form", ["A", "L"])
def test_every_architecture_in_either_form_fits_and_comes_back_the_same(
    architecture: str, form: str
) -> None:
    predictor = fitted(random_traces(), architecture=architecture, form=form, epochs=1)
    again = Task(**predictor.config())
    again.load_state(SPEC, predictor.tensors())
    history = history_of(0, 3)
    one, other = said(predictor.with_history(history)), said(again.with_history(history))
    assert torch.equal(one.next_LE, other.next_LE)
    assert torch.equal(one.forecast_LE, other.forecast_LE)


@pytest.mark.parametrize("form", ["A", "L"])
def test_a_layer_at_a_time_takes_one_call_a_layer(form: str) -> None:
    predictor = fitted(random_traces(), form=form, epochs=1)
    calls = []
    assert predictor._net is not None
    predictor._net.backbone.register_forward_hook(lambda *_: calls.append(1))
    said(predictor.with_history(history_of(0)))
    assert len(calls) == {"A": 1, "L": SPEC.num_layers}[form]


def test_between_two_calls_the_forecast_is_reused() -> None:
    predictor = fitted(random_traces(), period=3, epochs=1)
    assert predictor._net is not None
    windows: list[Tensor] = []
    predictor._net.register_forward_hook(lambda _, args, __: windows.append(args[0]))
    history = RequestHistory()
    following = predictor.with_history(history)
    forecasts = []
    for expert in (0, 1, 2, 3, 0, 1, 2):
        forecasts.append(said(following))
        history.add(torch.eye(4)[expert].expand(2, -1))
    # Popularity, then one call after the first request and one three requests later.
    assert [len({id(f) for f in forecasts[a:b]}) for a, b in ((0, 1), (1, 4), (4, 7))] == [1, 1, 1]
    assert len({id(forecast) for forecast in forecasts}) == 3
    assert len(windows) == 2
    assert windows[1][0].argmax(-1).tolist() == [[2, 2], [3, 3]]


def test_a_forecast_knows_the_finished_requests_alone() -> None:
    """What the request itself uses, and what comes later, is not in it; what came before is."""
    traces = runs()
    predictor = fitted(traces)
    mine, other = make_trace("x", [0] * 5), make_trace("x", [3] * 5)
    history = history_of(0, 1)
    following = predictor.with_history(history)
    one, two = (following.walk(trace).forecasts for trace in (mine, other))
    assert len({id(forecast) for forecast in [*one, *two]}) == 1
    before = said(following).next_LE
    history.add_trace(other, 4)
    assert not torch.equal(said(following).next_LE, before)


def test_two_histories_do_not_share_a_past_and_without_one_there_is_popularity() -> None:
    predictor = fitted(runs())
    one, other = predictor.with_history(history_of(0)), predictor.with_history(history_of(2))
    alone = said(one).next_LE
    assert not torch.equal(alone, said(other).next_LE)
    assert torch.equal(said(one).next_LE, alone)
    nothing = said(predictor)
    assert torch.equal(nothing.next_LE, said(predictor.with_history(RequestHistory())).next_LE)
    popularity = Popularity()
    popularity.fit(runs())
    ranked = popularity.tensors()["popularity_LE"].argsort(dim=-1)
    assert torch.equal(nothing.next_LE.argsort(dim=-1), ranked)


def test_judging_feeds_finished_requests_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the n-th request is judged, exactly the n before it are in the history."""
    predictor = fitted(runs())
    seen: list[tuple[int, list[int]]] = []
    original = Task.on_request

    def spying(self: Task, state: Any, request: Request) -> Forecast | None:
        history = self._history
        assert history is not None
        last = [int(use_LE[0].argmax()) for use_LE in history.before(history.num_finished, 1)]
        seen.append((history.num_finished, last))
        return original(self, state, request)

    monkeypatch.setattr(Task, "on_request", spying)
    evaluate_recall(predictor, runs())
    assert [num for num, _ in seen] == list(range(40))
    assert [last for _, last in seen[1:]] == [[n % 4] for n in range(39)]


def test_neither_prompts_nor_tokens_nor_probabilities_are_needed() -> None:
    traces = random_traces()
    bare = replace(
        traces, traces=[replace(t, prompt=None, token_ids_P=None) for t in traces.traces]
    )
    one, other = fitted(traces), fitted(bare)
    history = history_of(0, 3)
    assert torch.equal(
        said(one.with_history(history)).next_LE, said(other.with_history(history)).next_LE
    )


@pytest.mark.parametrize("num_prefill", [0, 5], ids=["decode only", "prefill only"])
def test_one_request_whose_use_never_changes_is_enough(num_prefill: int) -> None:
    """No spread to scale by, no val to choose by: popularity comes out, and nothing is NaN."""
    traces = make_traces({"fit": [make_trace("a", [2] * 5, num_prefill=num_prefill)]})
    predictor = fitted(traces)
    forecast = said(predictor.with_history(history_of(2)))
    assert forecast.next_LE.isfinite().all()
    assert forecast.next_LE.argmax(-1).tolist() == [2, 2]


def test_without_a_fitted_request_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match="no routed token has split 'fit'"):
        fitted(make_traces({"test": [make_trace("a", [0])]}))


def test_a_history_too_short_for_an_ageing_forecast_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps 8 requests; window=2 and period=7 reach back 9"):
        fitted(random_traces(), period=7, epochs=1).with_history(RequestHistory(capacity=8))


def test_fitting_leaves_the_callers_random_numbers_alone_and_repeats() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = fitted(random_traces(), epochs=1), fitted(random_traces(), epochs=1)
    assert torch.equal(torch.rand(3), expected)
    learned = other.tensors()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in one.tensors().items())
    reseeded = fitted(random_traces(), epochs=1, seed=1).tensors()
    assert not all(torch.equal(tensor, learned[name]) for name, tensor in reseeded.items())


def test_where_it_trained_is_not_part_of_what_it_is() -> None:
    assert "trainer" not in Task(trainer={"accelerator": "cpu"}).config()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"form": "B"}, r"form='B': must be one of \['A', 'L'\]"),
        ({"architecture": "t5"}, r"architecture='t5'.*xlnet.*gpt2.*bert"),
        ({"start": "zero"}, "start='zero'"),
        ({"window": 0}, "window=0: must be at least 1"),
        ({"period": 0}, "period=0"),
        ({"hidden_size": 30}, "hidden_size=30: must be a multiple of 4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"gamma": 1.0}, "gamma=1.0"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**option)
