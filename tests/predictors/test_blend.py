import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.errors import DamagedFileError
from data.schema import MoESpec, TraceList
from predictors import registry
from predictors.artifact import load_artifact, read_manifest, save_artifact
from predictors.base import FitReport, Forecast, Predictor, Request, State
from predictors.blend import Blend
from predictors.metrics import evaluate_recall
from predictors.none import Silent
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.request_history import RequestHistory
from predictors.router_reuse import RouterReuse
from predictors.routing import decode_rows, expert_use_TLE, traces_of
from predictors.semantic import Semantic
from predictors.task import Task
from tests.predictors.fakes import SPEC, WordEmbedder, make_trace, make_traces, random_traces


class Fixed(Predictor):
    """Says the same for ever; at later moments, what it is told to."""

    kind = "fixed"
    moments = frozenset({"request"})

    def __init__(self, next_E: Sequence[float], *, later_E: Sequence[float] = (1.0,) * 4) -> None:
        super().__init__()
        next_LE, later_LE = (torch.tensor(row).float().expand(2, -1) for row in (next_E, later_E))
        self.forecast = Forecast(next_LE, next_LE + later_LE)

    def fit(self, traces: Any) -> FitReport:
        self.spec = traces.spec
        return FitReport(0, 0, 0.0)

    def on_request(self, state: State, request: Request) -> Forecast | None:
        state.forecast = self.forecast
        return state.forecast

    def config(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, spec: MoESpec, tensors: Any) -> None:
        self.spec = spec


class Routed(Fixed):
    """Knows what layer l uses after a token: the expert that the layer has just routed to."""

    kind = "routed"
    moments = frozenset({"request", "routed"})

    def on_routed(self, state: State, layer: int, router_probs_E: Tensor) -> Tensor | None:
        return router_probs_E.clone()


def everything() -> Blend:
    return Blend(
        members={
            "semantic": Semantic(embedder=WordEmbedder()),
            "previous_token": PreviousToken(),
            "popularity": Popularity(),
        }
    )


def fitted(traces: TraceList, **members: Predictor) -> Blend:
    blend = Blend(members=members)
    blend.report = blend.fit(traces)  # type: ignore[attr-defined]
    return blend


def log_loss(predictor: Predictor, traces: TraceList, split: Any = "val") -> float:
    # A blend may be surer than the 1e-4 at which it cuts off what its members say.
    least = 1e-7 if isinstance(predictor, Blend) else 1e-4
    losses = []
    for trace in traces_of(traces, split):
        use_TLE = torch.from_numpy(expert_use_TLE(trace, 4)).float()
        for t, forecast in enumerate(predictor.walk(trace).forecasts):
            if t >= decode_rows(trace).start and forecast is not None:
                said_LE = forecast.next_LE.clamp(least, 1 - least)
                losses.append(torch.nn.functional.binary_cross_entropy(said_LE, use_TLE[t]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("seed", range(4))
def test_on_val_a_blend_loses_no_more_than_its_best_member(seed: int) -> None:
    traces = random_traces(seed, num_requests=24)
    blend = everything()
    report = blend.fit(traces)
    alone = {name: log_loss(member, traces) for name, member in blend.members.items()}
    together = log_loss(blend, traces)
    assert together <= min(alone.values()) + 1e-6
    assert report.details["val_log_loss"]["blend"] == pytest.approx(together, abs=1e-5)
    for name, loss in alone.items():
        assert report.details["val_log_loss"][name] == pytest.approx(loss, abs=1e-5)


def test_all_weight_goes_to_a_member_that_no_combination_beats() -> None:
    """The other one says nothing but a constant, and the good one is right to the last bit."""
    traces = random_traces(num_requests=24)
    share_E = np.mean([expert_use_TLE(t, 4).mean((0, 1)) for t in traces_of(traces, "val")], axis=0)
    blend = fitted(traces, good=Fixed(share_E), noise=Fixed([0.9, 0.1, 0.1, 0.1]))
    said = blend.walk(traces[0]).forecasts[0]
    assert said is not None
    assert log_loss(blend, traces) <= log_loss(blend.members["good"], traces) + 1e-7
    assert said.next_LE[0].numpy() == pytest.approx(share_E, abs=0.02)


def test_two_that_each_know_half_know_more_together() -> None:
    """One tells experts 0 and 1 apart, the other 2 and 3; by itself each is half blind."""
    rng = np.random.default_rng(0)
    requests = [
        make_trace(f"r{n}", rng.choice(4, 60, p=[0.65, 0.05, 0.25, 0.05])) for n in range(12)
    ]
    traces = make_traces({"fit": requests[:4], "val": requests[4:8], "test": requests[8:]})
    one = Fixed([0.65, 0.05, 0.15, 0.15])
    other = Fixed([0.35, 0.35, 0.25, 0.05])
    blend = fitted(traces, one=one, other=other)
    together = log_loss(blend, traces, "test")
    assert together < min(log_loss(one, traces, "test"), log_loss(other, traces, "test")) - 0.01
    assert evaluate_recall(blend, traces, lookaheads=(1,)).reliability.num_entries.sum()
    error = evaluate_recall(blend, traces).reliability.expected_calibration_error
    assert error < 0.05


def test_later_use_is_weighed_by_what_really_came_later() -> None:
    """The truth is twice one member's later use and nothing of the other's."""
    traces = make_traces(
        {
            "fit": [make_trace("a", [0, 1] * 20)],
            "val": [make_trace("b", [0, 1] * 40)],
        }
    )
    near = Fixed([0.4, 0.4, 0.1, 0.1], later_E=[4.75, 4.75, 0.0, 0.0])
    far = Fixed([0.4, 0.4, 0.1, 0.1], later_E=[0.0, 0.0, 9.0, 9.0])
    said = fitted(traces, near=near, far=far).walk(traces[0]).forecasts[0]
    assert said is not None
    later_E = (said.forecast_LE - said.next_LE)[0].tolist()
    # gamma / (1 - gamma) = 19 further uses in all, half of them expert 0's.
    assert later_E == pytest.approx([9.5, 9.5, 0.0, 0.0], abs=0.3)


def test_moments_are_the_members_together() -> None:
    blend = Blend(members={"a": Popularity(), "b": Routed([0.1] * 4)})
    assert blend.moments == {"request", "routed"}
    assert everything().moments == {"request", "token"}


def test_once_a_layer_has_routed_who_speaks_then_is_heard() -> None:
    traces = random_traces()
    blend = fitted(traces, routed=Routed([0.25] * 4), fixed=Fixed([0.25] * 4))
    state = blend.new_state()
    blend.on_request(state, Request())
    later_E = blend.on_routed(state, 1, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert later_E is not None
    weights_M = blend.tensors()["routed_ML"][:, 1]  # fixed, routed: by name
    assert later_E.tolist() == pytest.approx(
        [float(weights_M[0] + weights_M[1] * (e == 2)) for e in range(4)]
    )
    assert everything().on_routed(everything().new_state(), 0, torch.zeros(4)) is None


@pytest.mark.parametrize("routed", [False, True])
def test_a_walk_says_what_the_moments_say_one_by_one(routed: bool) -> None:
    traces = random_traces()
    more = {"routed": Routed([0.3, 0.3, 0.2, 0.2])} if routed else {}
    blend = fitted(traces, previous=PreviousToken(), popularity=Popularity(), **more)
    fast, slow = blend.walk(traces[5]), Predictor.walk(blend, traces[5])
    for a, b in zip(fast.forecasts, slow.forecasts, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a.next_LE, b.next_LE)
        assert torch.allclose(a.forecast_LE, b.forecast_LE)
    if routed:
        assert fast.later_TLE is not None
        assert slow.later_TLE is not None
        assert torch.allclose(fast.later_TLE, slow.later_TLE, atol=1e-6)
    else:
        assert fast.later_TLE is slow.later_TLE is None


def test_members_that_speak_once_make_one_forecast_a_request() -> None:
    blend = fitted(random_traces(), a=Popularity(), b=Fixed([0.25] * 4))
    assert len({id(said) for said in blend.walk(make_trace("x", [0] * 9)).forecasts}) == 1


def test_who_is_silent_leaves_the_word_to_the_others() -> None:
    traces = random_traces()
    blend = fitted(traces, a=Silent(), b=Fixed([0.7, 0.1, 0.1, 0.1]))
    said = blend.walk(traces[0]).forecasts[0]
    assert said is not None
    assert said.next_LE[0].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=1e-5)
    assert set(fitted(traces, a=Silent()).walk(traces[0]).forecasts) == {None}


def test_without_val_requests_all_weigh_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """One request, which never changes."""
    traces = make_traces({"fit": [make_trace("a", [2] * 9)]})
    with caplog.at_level(logging.WARNING):
        blend = fitted(traces, a=Popularity(), b=PreviousToken())
    assert "equal weights" in caplog.text
    assert blend.tensors()["weights_ML"].unique().tolist() == [0.5]
    said = blend.walk(traces[0]).forecasts[-1]
    assert said is not None
    assert said.next_LE.argmax(-1).tolist() == [2, 2]


def test_one_val_token_that_never_changes_is_survived() -> None:
    traces = make_traces({"fit": [make_trace("a", [2])], "val": [make_trace("b", [2])]})
    blend = fitted(traces, a=Popularity(), b=PreviousToken())
    said = blend.walk(traces[0]).forecasts[0]
    assert said is not None
    assert said.next_LE.isfinite().all()
    assert said.next_LE.argmax(-1).tolist() == [2, 2]


def test_what_is_missing_in_a_trace_only_its_reader_misses() -> None:
    """Without tokens and probabilities the members still fit; without prompts semantic says so."""
    traces = random_traces()
    bare = replace(traces, traces=[replace(t, token_ids_P=None) for t in traces.traces])
    assert evaluate_recall(fitted(bare, a=Popularity(), b=PreviousToken()), bare).recall > 0.4
    no_prompt = replace(bare, traces=[replace(t, prompt=None) for t in bare.traces])
    with pytest.raises(ValueError, match="prompt.*popularity"):
        everything().fit(no_prompt)


def test_a_history_reaches_the_members_that_read_it_and_them_alone() -> None:
    small = {"hidden_size": 8, "depth": 1, "window": 2, "epochs": 1, "period": 1}
    blend = fitted(
        random_traces(), task=Task(**small, trainer={"accelerator": "cpu"}), popularity=Popularity()
    )
    history = RequestHistory()
    following = blend.with_history(history)
    assert following is not blend
    assert following.members["popularity"] is blend.members["popularity"]
    trace = make_trace("x", [3] * 9)
    before = following.walk(trace).forecasts[0]
    history.add_trace(trace, 4)
    after = following.walk(trace).forecasts[0]
    assert before is not None
    assert after is not None
    assert not torch.equal(before.forecast_LE, after.forecast_LE)
    plain = fitted(random_traces(), popularity=Popularity())
    assert plain.with_history(history) is plain


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A blend with a blend in it; both hold a predictor that searches."""
    monkeypatch.setitem(registry.EMBEDDERS, "words", WordEmbedder)
    blend = Blend(members={"wide": everything(), "near": Semantic(embedder=WordEmbedder())})
    blend.fit(random_traces())
    return save_artifact(blend, tmp_path / "a", spec=SPEC, parents={})


def test_an_artifact_holds_all_members_and_their_indices(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    indices = {"near.index.faiss", "wide.semantic.index.faiss"}
    assert set(manifest.files) == {"state.safetensors", *indices}
    assert "_target_" not in (artifact / "manifest.json").read_text()
    again = load_artifact(artifact, expect=SPEC)
    blend = Blend(members={"wide": everything(), "near": Semantic(embedder=WordEmbedder())})
    blend.fit(random_traces())
    assert again.config() == blend.config()
    trace = random_traces()[3]
    for one, other in zip(blend.walk(trace).forecasts, again.walk(trace).forecasts, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.next_LE, other.next_LE)
        assert torch.equal(one.forecast_LE, other.forecast_LE)


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({"x": {"kind": "nobody", "config": {}, "embedder": None}}, ValueError, "nobody.*semantic"),
        ({"x": {"kind": "popularity"}}, DamagedFileError, "config of blend: .*PredictorEntry"),
        ({"../x": {"kind": "popularity", "config": {}, "embedder": None}}, ValueError, r"\.\./x"),
        ("all of them", DamagedFileError, "config of blend"),
    ],
    ids=["unknown kind", "no entry", "a path for a name", "no mapping"],
)
def test_members_that_we_did_not_write_are_named(
    artifact: Path, members: Any, error: type[Exception], message: str
) -> None:
    file = artifact / "manifest.json"
    values = json.loads(file.read_text())
    values["config"]["members"] = members
    file.write_text(json.dumps(values))
    with pytest.raises(error, match=message):
        load_artifact(artifact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "needs at least one"),
        ({"members": {"a b": Popularity()}}, "'a b' is no identifier"),
        ({"members": {"a": Oracle()}}, r"members\.a: 'oracle' reads the recorded future"),
        ({"members": {"a": RouterReuse()}}, r"members\.a: 'router_reuse' reads the model itself"),
        ({"members": {"a": Popularity(gamma=0.9)}}, r"members\.a\.gamma=0\.9: must be gamma=0\.95"),
    ],
    ids=["none", "name", "oracle", "model", "gamma"],
)
def test_a_member_that_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blend(**options)
