"""The forecaster follows text that it was not fitted on, and nothing that is not finished."""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.errors import DamagedFileError
from data.schema import MoESpec, Trace, TraceList
from predictors import follower
from predictors.artifact import load_artifact, save_artifact
from predictors.base import Forecast, Predictor, Request, Walked
from predictors.follower import Follower, Said, start_of
from predictors.forecaster import Forecaster
from predictors.lessons import Beside
from predictors.request_history import RequestHistory
from predictors.routing import traces_of
from predictors.shared_net import SharedNet
from predictors.token_history import as_rows, first_past_RLE, next_past_RLE
from tests.predictors.fakes import SPEC, make_trace, make_traces

PATIENCE_S = 20.0
SMALL: dict[str, Any] = {
    "hidden_dim": 16,
    "epochs": 4,
    "batch_size": 32,
    "dropout": 0.1,
    "weight_decay": 0.01,
    "learning_rate": 1e-2,
    "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
}


def shifted_traces() -> TraceList:
    """Fitted: expert 0 or 1. Tested: 3 most of the time."""
    rng = np.random.default_rng(0)
    parts: dict[Any, list[Trace]] = {"fit": [], "val": [], "test": []}
    for n in range(32):
        split = ("fit", "fit", "val", "test")[n % 4]
        odds = [0.04, 0.08, 0.08, 0.8] if split == "test" else [0.55, 0.35, 0.05, 0.05]
        parts[split].append(make_trace(f"r{n}", rng.choice(4, 60, p=odds), tokens=[0] * 60))
    return make_traces(parts)


@pytest.fixture(scope="module")
def tested() -> list[Trace]:
    return list(traces_of(shifted_traces(), "test"))


@pytest.fixture(scope="module")
def fitted() -> Forecaster:
    predictor = Forecaster(**SMALL)
    predictor.fit(shifted_traces())
    return predictor


def followed(predictor: Forecaster, finished: list[Trace]) -> Forecaster:
    """A view that has seen these requests come to their ends."""
    history = RequestHistory()
    view = predictor.with_history(history)
    for trace in finished:
        view.walk(trace)
        history.add_trace(trace, SPEC.num_experts)
    return view


def leads(view: Forecaster) -> tuple[bool, bool]:
    assert view._follower is not None
    return view._follower.leads


def assert_close(one: Walked, other: Walked, atol: float) -> None:
    assert len(one.forecasts) == len(other.forecasts)
    for said, again in zip(one.forecasts, other.forecasts, strict=True):
        assert said is not None
        assert again is not None
        torch.testing.assert_close(said, again, rtol=0, atol=atol)
    torch.testing.assert_close(one.later_TLE, other.later_TLE, rtol=0, atol=atol)


def first_choice(said: Forecast | None) -> int:
    assert said is not None
    return int(said.next_LE[0].argmax())


def test_another_domain_is_followed_once_requests_of_it_have_finished(
    fitted: Forecaster, tested: list[Trace]
) -> None:
    history = RequestHistory()
    view = fitted.with_history(history)
    told = []
    for trace in tested:
        told.append(view.walk(trace))
        history.add_trace(trace, SPEC.num_experts)
    firsts = [first_choice(walked.forecasts[0]) for walked in told]
    assert firsts[0] != 3  # nothing of the new domain has been seen
    assert firsts[1:] == [3] * (len(tested) - 1)
    assert leads(view) == (True, True)
    later_TLE = told[-1].later_TLE
    assert later_TLE is not None
    assert float((later_TLE[:, 0].argmax(-1) == 3).float().mean()) > 0.9
    assert_close(fitted.walk(tested[0]), told[0], atol=0)  # what was fitted stays as it was


def test_token_by_token_it_says_what_a_whole_trace_is_told(
    fitted: Forecaster, tested: list[Trace]
) -> None:
    histories = RequestHistory(), RequestHistory()
    whole, streamed = (fitted.with_history(history) for history in histories)
    for trace in tested[:4]:
        assert_close(whole.walk(trace), Predictor.walk(streamed, trace), atol=1e-3)
        for history in histories:
            history.add_trace(trace, SPEC.num_experts)
    assert leads(whole) == leads(streamed) == (True, True)


def test_a_long_trace_in_parts_is_told_what_it_is_told_at_once(
    fitted: Forecaster, tested: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [followed(fitted, tested[:2]) for _ in range(2)]
    at_once = views[0].walk(tested[2])
    monkeypatch.setattr("predictors.forecaster._WALK_TOKENS", 7)
    assert_close(at_once, views[1].walk(tested[2]), atol=1e-5)


def test_it_learns_on_where_a_replay_runs_in_inference_mode(
    fitted: Forecaster, tested: list[Trace]
) -> None:
    history = RequestHistory()
    with torch.inference_mode():
        view = fitted.with_history(history)
        for trace in tested[:3]:
            said = Predictor.walk(view, trace).forecasts[0]
            history.add_trace(trace, SPEC.num_experts)
    assert first_choice(said) == 3


def test_a_running_request_changes_nothing(fitted: Forecaster, tested: list[Trace]) -> None:
    """Only `RequestHistory` tells that a request is over; until then nothing is learned of it."""
    view = followed(fitted, tested[:2])
    first, again = view.walk(tested[2]), view.walk(tested[2])
    assert_close(first, again, atol=0)


def test_the_future_is_not_seen_where_the_rule_leads(
    fitted: Forecaster, tested: list[Trace]
) -> None:
    ids_TLK = tested[2].topk_expert_ids_TLK.copy()
    ids_TLK[20:] = (ids_TLK[20:] + 1) % 4
    ids_TLK[20, 0] = tested[2].topk_expert_ids_TLK[20, 0]  # layer 0 of row 20 stays
    other = replace(tested[2], topk_expert_ids_TLK=ids_TLK)
    told, otherwise = (followed(fitted, tested[:2]).walk(trace) for trace in (tested[2], other))
    assert told.later_TLE is not None
    assert otherwise.later_TLE is not None
    for t in range(21):
        one, two = told.forecasts[t], otherwise.forecasts[t]
        assert one is not None
        assert two is not None
        assert torch.equal(one.next_LE, two.next_LE)
        assert torch.equal(one.forecast_LE, two.forecast_LE)
    assert torch.equal(told.later_TLE[:20], otherwise.later_TLE[:20])
    assert torch.equal(told.later_TLE[20, 0], otherwise.later_TLE[20, 0])
    assert not torch.equal(told.later_TLE[20, 1], otherwise.later_TLE[20, 1])


def test_requests_side_by_side_have_a_past_each(fitted: Forecaster, tested: list[Trace]) -> None:
    alone = [Predictor.walk(followed(fitted, tested[:2]), trace) for trace in tested[2:4]]
    view = followed(fitted, tested[:2])
    states = [view.new_state() for _ in range(2)]
    said = [[view.on_request(state, Request.of(tested[2]))] for state in states]
    for t in range(20):
        for state, trace, told in zip(states, tested[2:4], said, strict=True):
            map_LE = torch.from_numpy(trace.expert_map_LE(t, SPEC.num_experts))
            told.append(view.on_token(state, map_LE, token_id=0, next_token_id=0))
    for told, walked in zip(said, alone, strict=True):
        for one, two in zip(told, walked.forecasts[:21], strict=True):
            assert one is not None
            assert two is not None
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_request_goes_on_being_learned_from_while_others_finish(
    fitted: Forecaster, tested: list[Trace]
) -> None:
    history = RequestHistory()
    view = fitted.with_history(history)
    state = view.new_state()
    view.on_request(state, Request())
    map_LE = torch.from_numpy(tested[0].expert_map_LE(0, SPEC.num_experts))
    for num_learned in (5, 10):
        for _ in range(5):
            view.on_token(state, map_LE)
        history.add(torch.full((2, 4), 0.25))
        view.on_request(view.new_state(), Request())  # the next one begins
        assert view._follower is not None
        assert sum(len(part.use_TLE) for part in view._follower._learned) == num_learned
    assert state.followed is not None
    assert not state.followed.gathered


def test_two_owners_learn_apart(fitted: Forecaster, tested: list[Trace]) -> None:
    before = {name: tensor.clone() for name, tensor in fitted.tensors().items()}
    followed(fitted, tested[:3])
    untouched = fitted.with_history(RequestHistory())
    assert leads(untouched) == (False, False)
    assert_close(untouched.walk(tested[3]), fitted.walk(tested[3]), atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fitted.tensors().items())


def test_where_the_networks_know_better_nothing_changes() -> None:
    """Expert n mod 4 in turn: the networks know it, and a rule for all experts cannot."""
    parts: dict[Any, list[Trace]] = {"fit": [], "test": []}
    for n in range(12):
        experts = [(n + t) % 4 for t in range(60)]
        parts["test" if n % 3 == 2 else "fit"].append(make_trace(f"r{n}", experts))
    predictor = Forecaster(**{**SMALL, "epochs": 12})
    predictor.fit(make_traces(parts))
    history = RequestHistory()
    view = predictor.with_history(history)
    for trace in parts["test"]:
        assert_close(view.walk(trace), predictor.walk(trace), atol=0)
        history.add_trace(trace, SPEC.num_experts)
        view.on_request(view.new_state(), Request())
        assert leads(view) == (False, False)


class _Judged:
    """A follower of a rule that has learned nothing, and of networks that are made up."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.history = RequestHistory()
        self.follower = Follower(
            SharedNet(num_discounts=1),
            self.history,
            discounts=[0.9],
            popularity_LE=torch.full((2, 4), 0.25),
            top_k=1,
        )

    def request(self, experts: list[int], own: Said) -> Forecast:
        """Runs one request to its end; gives what was said before its tokens."""
        followed = self.follower.begin()
        use_TLE = torch.zeros(len(experts), 2, 4)
        use_TLE[torch.arange(len(experts)), :, torch.tensor(experts)] = 1.0
        past_RLE, rows = first_past_RLE(torch.full((2, 4), 0.25)), []
        for use_LE in use_TLE:
            rows.append(as_rows(past_RLE))
            past_RLE = next_past_RLE(past_RLE, use_LE, use_LE)
        rows.append(as_rows(past_RLE))
        said = followed.say(torch.stack(rows[:-1]), own)
        followed.add(torch.stack(rows[1:]))
        self.history.add(use_TLE.mean(0))
        return said


def said_of(experts: list[int], *, ahead: float) -> Said:
    """Networks that rank the next expert first, and say ``ahead`` of keeping any."""
    next_TLE = torch.full((len(experts), 2, 4), 0.01)
    next_TLE[torch.arange(len(experts)), :, torch.tensor(experts)] = 0.02
    return Said(next_TLE, torch.full_like(next_TLE, ahead))


def test_what_comes_next_and_what_to_keep_are_chosen_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    experts = [0, 2, 1, 3] * 20
    own = said_of(experts, ahead=1.0)  # never wrong of the next token, and far too sure of the rest
    judged = _Judged()
    first = judged.request(experts, own)
    assert torch.equal(first.next_LE, own.next_TLE)
    assert torch.equal(first.forecast_LE, own.ahead_TLE)
    with caplog.at_level(logging.INFO):
        second = judged.request(experts, own)
    assert judged.follower.leads == (False, True)
    assert "what to keep is now said by the rule" in caplog.text
    assert "what comes next" not in caplog.text
    assert torch.equal(second.next_LE, own.next_TLE)
    assert not torch.equal(second.forecast_LE, own.ahead_TLE)
    assert bool((second.forecast_LE >= second.next_LE).all())

    other = _Judged()
    wrong = said_of([0] * 80, ahead=0.7)  # the truth of four experts that take turns, on average
    other.request([1] * 80, wrong)
    other.request([1] * 80, wrong)
    assert other.follower.leads.next


def test_the_networks_get_back_what_they_have_become_better_at() -> None:
    judged = _Judged()
    judged.request([1] * 80, said_of([0] * 80, ahead=1.0))
    judged.request([1] * 80, said_of([0] * 80, ahead=1.0))
    assert judged.follower.leads == (True, True)
    experts = np.random.default_rng(0).integers(0, 4, 80).tolist()
    for _ in range(30):
        judged.request(experts, said_of(experts, ahead=0.7))
    assert not judged.follower.leads.next


def test_what_is_remembered_is_bounded(fitted: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("predictors.follower._REQUEST_TOKENS", 30)
    monkeypatch.setattr("predictors.follower._LEARNED_TOKENS", 50)
    history = RequestHistory()
    view = fitted.with_history(history)
    state = view.new_state()
    view.on_request(state, Request())
    map_LE = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2)
    for _ in range(40):
        view.on_token(state, map_LE)
    assert state.followed is not None
    assert sum(len(part.use_TLE) for part in state.followed.gathered) == 30
    for n in range(5):
        view.walk(make_trace(f"r{n}", [n % 4] * 40))
        history.add(torch.full((2, 4), 0.25))
    view.on_request(view.new_state(), Request())
    assert view._follower is not None
    assert [len(part.use_TLE) for part in view._follower._learned] == [30, 30]


def test_requests_that_are_broken_off_do_not_pile_up(
    fitted: Forecaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("predictors.follower._OPEN_REQUESTS", 3)
    view = fitted.with_history(RequestHistory())
    states = [view.new_state() for _ in range(5)]
    for state in states:
        view.on_request(state, Request())
        view.on_token(state, torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2))
    assert view._follower is not None
    assert len(view._follower._open) == 3
    gathered = [bool(state.followed and state.followed.gathered) for state in states]
    assert gathered == [False, False, True, True, True]


def test_a_start_is_the_use_of_finished_requests_and_even_without() -> None:
    assert torch.equal(start_of([], (2, 4), 1), torch.full((2, 4), 0.25))
    one_LE = torch.tensor([[1.0, 0, 0, 0]] * 2)
    start_LE = start_of([one_LE] * 3, (2, 4), 1)
    assert start_LE[0].tolist() == pytest.approx([3.125 / 3.5] + 3 * [0.125 / 3.5])


def test_an_artifact_follows_as_what_was_saved(
    fitted: Forecaster, tested: list[Trace], tmp_path: Path
) -> None:
    save_artifact(fitted, tmp_path / "a", spec=SPEC, parents={})
    again = load_artifact(tmp_path / "a")
    assert isinstance(again, Forecaster)
    one, two = (followed(predictor, tested[:2]) for predictor in (fitted, again))
    assert_close(one.walk(tested[2]), two.walk(tested[2]), atol=0)
    assert leads(two) == (True, True)


def test_what_was_saved_before_there_was_a_rule_says_so_and_follows_nothing(
    fitted: Forecaster, tested: list[Trace], caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {k: t for k, t in fitted.tensors().items() if not k.startswith("shared.")}
    old = Forecaster(**fitted.config())
    old.load_state(SPEC, tensors)
    assert "fitted before forecasters followed finished requests" in caplog.text
    assert old.with_history(RequestHistory()) is old
    assert_close(old.walk(tested[0]), fitted.walk(tested[0]), atol=0)


def test_half_a_rule_is_refused(fitted: Forecaster, tmp_path: Path) -> None:
    class Halved(Forecaster):
        def tensors(self) -> dict[str, torch.Tensor]:
            return {k: t for k, t in fitted.tensors().items() if k != "shared.say.bias"}

    halved = Halved(**fitted.config())
    halved.load_state(SPEC, fitted.tensors())
    save_artifact(halved, tmp_path / "a", spec=SPEC, parents={})
    assert "shared.say.weight" in load_file(tmp_path / "a" / "state.safetensors")
    with pytest.raises(DamagedFileError, match=r"shared\.say\.bias"):
        load_artifact(tmp_path / "a")


def test_a_graph_holds_the_networks_and_says_where_the_rule_leads(
    fitted: Forecaster, tested: list[Trace], caplog: pytest.LogCaptureFixture
) -> None:
    view = followed(fitted, tested[:2])
    view.on_request(view.new_state(), Request())
    graph = view.graph_module(batch_size=1)
    assert "what comes next: yes; what to keep: yes" in caplog.text
    graph.begin()
    networks = fitted.on_request(fitted.new_state(), Request())
    assert networks is not None
    torch.testing.assert_close(graph.next_LE, networks.next_LE, rtol=1e-4, atol=1e-5)
    caplog.clear()
    fitted.graph_module(batch_size=1)
    assert not caplog.records  # it remembers no requests and says the same as the graph


def test_a_prompt_shown_at_once_counts_as_past_and_is_not_learned_from(
    fitted: Forecaster, tested: list[Trace]
) -> None:
    view = followed(fitted, tested[:2])
    maps_TLE = torch.from_numpy(tested[2].expert_maps_TLE(SPEC.num_experts))
    at_once, in_turn = view.new_state(), view.new_state()
    for state in (at_once, in_turn):
        view.on_request(state, Request())
    said = view.on_tokens(at_once, maps_TLE[:20], token_ids_T=[0] * 20, next_token_ids_T=[0] * 20)
    for map_LE in maps_TLE[:20]:
        singly = view.on_token(in_turn, map_LE, token_id=0, next_token_id=0)
    assert leads(view) == (True, True)
    assert said is not None
    assert singly is not None
    torch.testing.assert_close(said, singly, rtol=0, atol=1e-5)
    for layer in range(SPEC.num_layers):
        later = [view.on_routed(one, layer, maps_TLE[20, layer]) for one in (at_once, in_turn)]
        torch.testing.assert_close(later[0], later[1], rtol=0, atol=1e-5)
    assert at_once.followed is not None
    assert in_turn.followed is not None
    assert not at_once.followed.gathered
    assert len(in_turn.followed.gathered) == 20
    view.on_token(at_once, maps_TLE[20], token_id=0, next_token_id=0)
    assert len(at_once.followed.gathered) == 1


def test_requests_of_one_token_and_of_none_teach_nothing(fitted: Forecaster) -> None:
    history = RequestHistory()
    view = fitted.with_history(history)
    for trace in (make_trace("one", [3]), make_trace("none", []), make_trace("two", [3, 3])):
        view.walk(trace)
        history.add_trace(trace, SPEC.num_experts)
    assert leads(view) == (False, False)
    view.on_request(view.new_state(), Request())
    assert view._follower is not None
    assert [len(part.use_TLE) for part in view._follower._learned] == [1]


def test_a_small_layer_is_followed_too() -> None:
    """One layer of two experts, of which one runs."""
    spec = MoESpec(model_id="odd", num_experts=2, top_k=1, decoder_layers=(0,))
    ids = np.array([0, 1] * 20, np.uint8)[:, None, None]
    traces = [replace(make_trace(f"r{n}", [0, 1] * 20), topk_expert_ids_TLK=ids) for n in range(3)]
    split: dict[str, Any] = {"r0": "fit", "r1": "test", "r2": "test"}
    predictor = Forecaster(**{**SMALL, "epochs": 1})
    predictor.fit(TraceList(spec=spec, traces=traces, split=split, digest="odd"))
    history = RequestHistory()
    view = predictor.with_history(history)
    for trace in traces:
        assert view.walk(trace).later_TLE is not None
        history.add_trace(trace, 2)


def test_a_request_that_begins_during_a_lesson_is_told_what_held_before(
    fitted: Forecaster, tested: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once the lesson is over, what is told to who waited for it."""
    at_once = followed(fitted, tested[:2])  # of the first request, before the second one
    may_learn, learn = threading.Event(), follower.learn

    def slowly(*args: Any, **kwargs: Any) -> None:
        assert may_learn.wait(PATIENCE_S)
        learn(*args, **kwargs)

    monkeypatch.setattr(follower, "learn", slowly)
    lessons = Beside()
    history = RequestHistory(lessons=lessons)
    view = fitted.with_history(history)
    for trace in tested[:2]:
        view.walk(trace)
        history.add_trace(trace, SPEC.num_experts)
    assert_close(fitted.walk(tested[2]), view.walk(tested[2]), atol=0)
    assert lessons.num_put_off == 1
    assert leads(view) == (False, False)
    may_learn.set()
    assert lessons.join(PATIENCE_S)
    assert leads(view) == leads(at_once) != (False, False)
    # What was put off is learned now, beside a request that is told what the first lesson left.
    assert first_choice(view.walk(tested[3]).forecasts[0]) == 3
    assert lessons.join(PATIENCE_S)
    assert lessons.num_put_off == 1
    assert len(view._follower._learned) == 3  # type: ignore[union-attr]


def test_what_goes_wrong_in_a_lesson_is_told_to_the_next_request(
    fitted: Forecaster, tested: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("nobody has thought of this")

    monkeypatch.setattr(follower, "learn", broken)
    lessons = Beside()
    history = RequestHistory(lessons=lessons)
    view = fitted.with_history(history)
    for trace in tested[:2]:
        view.walk(trace)
        history.add_trace(trace, SPEC.num_experts)
    assert lessons.join(PATIENCE_S)
    with pytest.raises(ZeroDivisionError, match="nobody has thought"):
        view.on_request(view.new_state(), Request())
