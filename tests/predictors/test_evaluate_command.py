"""``python -m predictors.evaluate``, as it is called, on every kind of trace."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.importers import load_traces
from data.schema import TraceList
from data.sources.trace import redraw
from predictors.artifact import save_artifact
from predictors.gate_mlp import GateMLP
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from predictors.router_reuse import RouterReuse
from predictors.routing import request_digest
from tests.predictors import layer_fakes

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS, TOP_K = 3, 8, 2
KEYS = {
    "recall_at_k",
    "recall_curve",
    "per_layer",
    "gap_closed",
    "reliability",
    "us_per_token",
    "hit_ratio",
    "prefetch",
    "cost",
    "judged",
    "digests",
    "versions",
}


def write_npz(
    path: Path,
    *,
    lengths: Sequence[int] = (30, 20, 40, 25, 30, 35, 20, 30, 25, 30),
    probs: bool = False,
    prompts: bool = False,
    say_experts: bool = True,
    seed: int = 0,
    experts: int = EXPERTS,
    favourite: int = 0,
) -> Path:
    """Routing in which a token mostly keeps what the one before it used."""
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    ids = np.zeros((tokens, LAYERS, TOP_K), np.uint8)
    for layer in range(LAYERS):
        now = rng.choice(experts, TOP_K, replace=False)
        for t in range(tokens):
            if rng.random() < 0.4:
                now = rng.choice(experts, TOP_K, replace=False)
            if rng.random() < 0.3 and favourite not in now:
                now = np.array([favourite, now[1]])
            ids[t, layer] = now
    arrays: dict[str, Any] = {"experts": ids, "seq_offsets": np.cumsum([0, *lengths])}
    if probs:
        raw = rng.random(ids.shape).astype(np.float16) + np.float16(0.1)
        arrays["probs"] = raw / raw.sum(-1, keepdims=True)
    if prompts:
        arrays |= {
            "tokens": rng.integers(0, 3, tokens),
            "prompt_tokens": rng.integers(0, 3, 2 * len(lengths)),
            "prompt_offsets": np.arange(0, 2 * len(lengths) + 1, 2),
        }
        path.with_name(f"{path.stem}.vocab.json").write_text('["a", " cat", " ship"]')
    np.savez(path, **arrays)
    info = {"model": "tiny"} | ({"num_experts": experts} if say_experts else {})
    path.with_name(f"{path.stem}.info.json").write_text(json.dumps(info))
    return path


def fit(path: Path, trace: Path, kind: type = PreviousToken, **redrawn: Any) -> Path:
    traces = load_traces(trace)
    assert isinstance(traces, TraceList)
    if redrawn:
        traces = redraw(traces, **redrawn)
    predictor = kind()
    report = predictor.fit(traces)
    return save_artifact(
        predictor,
        path,
        spec=traces.spec,
        parents={"traces": traces.digest},
        fitted_requests=[
            request_digest(trace)
            for trace in traces.traces
            if traces.split[trace.request_id] != "test"
        ],
        fit_report=report,
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fitted")
    trace = write_npz(folder / "fitted.npz")
    return fit(folder / "artifact", trace), trace


def evaluate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, Any]:
    """Run the command in this process; its JSON line, after checking what every one must hold."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    runpy.run_module("predictors.evaluate", run_name="__main__", alter_sys=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10, "a table for people comes first"
    result: dict[str, Any] = json.loads(lines[-1])
    assert set(result) >= KEYS
    assert set(result["gap_closed"]) == {"0.25", "0.4", "0.5"}
    assert [int(k) for k in result["recall_curve"]] == list(range(TOP_K, 3 * TOP_K + 1))
    assert result["recall_curve"][str(TOP_K)] == result["recall_at_k"]
    assert np.mean(result["per_layer"]) == pytest.approx(result["recall_at_k"])
    assert result["us_per_token"] > 0
    for ratios in result["hit_ratio"].values():
        assert 0 <= ratios["lfru"] <= ratios["belady"] <= 1
        assert {"lru", "forecast"} <= set(ratios)
    return result


TRACES = {
    "decode_only": {"prompts": True},
    "prefill_only": {},
    "probabilities": {"probs": True},
    "everything": {"probs": True, "prompts": True},
    "one_request": {"lengths": (40,)},
    "one_token_each": {"lengths": (1, 1, 1)},
    "an_empty_request": {"lengths": (0, 12, 0, 9)},
    "unsaid_experts": {"say_experts": False},
}


@pytest.mark.parametrize("options", TRACES.values(), ids=TRACES)
def test_any_trace_of_the_model_is_judged(
    fitted: tuple[Path, Path],
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = write_npz(tmp_path / "other.npz", seed=1, **options)
    result = evaluate(monkeypatch, capsys, f"artifact={fitted[0]}", f"trace={trace}")
    lengths = options.get("lengths", (30, 20, 40, 25, 30, 35, 20, 30, 25, 30))
    assert result["judged"]["split"] == "all"
    assert "not the traces that it was fitted on" in result["judged"]["why"]
    assert result["num_tokens"] == sum(lengths)
    assert result["prefill"] == ("union" if options.get("prompts") else "per_token")


def test_only_test_requests_of_the_traces_of_the_fit_are_judged(
    fitted: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, trace = fitted
    result = evaluate(monkeypatch, capsys, f"artifact={artifact}", f"trace={trace}")
    traces = load_traces(trace)
    test = [i for i in range(len(traces)) if traces.split[traces[i].request_id] == "test"]
    assert result["judged"]["split"] == "test"
    assert result["judged"]["num_requests"] == len(test) < len(traces)
    assert result["num_tokens"] == sum(traces[i].num_tokens for i in test)
    everything = evaluate(
        monkeypatch, capsys, f"artifact={artifact}", f"trace={trace}", "split=all"
    )
    assert everything["judged"]["num_requests"] == len(traces)


def test_requests_of_the_fit_are_known_again_under_another_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the file's own split, requests that another seed gave to the fit would be judged."""
    trace = write_npz(tmp_path / "x.npz")
    own = load_traces(trace)
    assert isinstance(own, TraceList)
    seed = next(s for s in range(1, 99) if redraw(own, split_seed=s).split != own.split)
    held_out = [r for r, part in redraw(own, split_seed=seed).split.items() if part == "test"]
    artifact = fit(tmp_path / "artifact", trace, split_seed=seed)
    result = evaluate(monkeypatch, capsys, f"artifact={artifact}", f"trace={trace}")
    assert result["judged"]["split"] == "unseen"
    assert result["judged"]["num_requests"] == len(held_out)
    lengths = {own[i].request_id: own[i].num_tokens for i in range(len(own))}
    assert result["num_tokens"] == sum(lengths[name] for name in held_out)


def test_requests_of_the_fit_are_known_again_in_another_file(
    fitted: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An artifact of two domains looked fine on one of them, having been fitted on its requests."""
    artifact, trace = fitted
    traces = load_traces(trace)
    arrays = np.load(trace)
    end = arrays["seq_offsets"][5]  # the first five requests alone
    np.savez(
        tmp_path / "half.npz",
        experts=arrays["experts"][:end],
        seq_offsets=arrays["seq_offsets"][:6],
    )
    result = evaluate(monkeypatch, capsys, f"artifact={artifact}", f"trace={tmp_path / 'half.npz'}")
    test = [i for i in range(5) if traces.split[traces[i].request_id] == "test"]
    assert 0 < len(test) < 5, "the file must mix both for this to show anything"
    assert result["judged"]["num_requests"] == len(test)
    assert f"{5 - len(test)} of 5 that it was fitted on" in result["judged"]["why"]


def test_a_predictor_that_knows_the_next_token_better_scores_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_npz(tmp_path / "x.npz")
    recalls = []
    for kind in (Popularity, PreviousToken):
        artifact = fit(tmp_path / kind.kind, trace, kind)
        result = evaluate(monkeypatch, capsys, f"artifact={artifact}", f"trace={trace}")
        recalls.append(result["recall_at_k"])
    assert recalls[1] > recalls[0] + 0.1


def test_options_choose_budgets_and_how_much_is_replayed(
    fitted: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, trace = fitted
    arguments = ["max_tokens=20", "residencies=[0.25,0.4,0.5,1.0]", "prefetch_experts=3"]
    monkeypatch.setattr(sys, "argv", ["x", f"artifact={artifact}", f"trace={trace}", *arguments])
    runpy.run_module("predictors.evaluate", run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_tokens"] == 20
    assert result["gap_closed"]["1"] is None, "with everything resident nothing is evicted"
    prefetch = result["prefetch"]
    assert prefetch["issued"] == 20 * LAYERS * 3 == prefetch["used"] + prefetch["wasted"]
    assert prefetch["coverage"] == pytest.approx(result["recall_curve"]["3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trace": "other_model"}, "8 experts"),
        ({"trace": "/no/such.npz"}, "no such file"),
        ({"artifact": "/no/artifact"}, "is no artifact"),
        ({"residencies": "[0]"}, "must be a share in (0, 1]"),
        ({"policies": "[lrru]"}, "lrru"),
        ({"prefetch_experts": "7"}, "1..6"),
        ({"prefetch_bytes": "100"}, "needs the experts' sizes"),
        ({"max_tokens": "0"}, "max_tokens=0"),
        ({"split": "tets"}, "tets"),
        ({"lookaheads": "[2]"}, "must hold 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(
    fitted: tuple[Path, Path],
    tmp_path: Path,
    changes: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, trace = fitted
    if changes.get("trace") == "other_model":
        changes = {"trace": str(write_npz(tmp_path / "y.npz", experts=16))}
    arguments = {"artifact": str(artifact), "trace": str(trace), **changes}
    monkeypatch.setattr(sys, "argv", ["x", *(f"{k}={v}" for k, v in arguments.items())])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("predictors.evaluate", run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "kind", [partial(GateMLP, steps=1, width=8), RouterReuse], ids=["gate_mlp", "router_reuse"]
)
def test_what_reads_a_live_model_is_refused_by_name(
    tmp_path: Path,
    kind: Callable[[], GateMLP | RouterReuse],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would say nothing at all, and the report would look like that of a bad predictor."""
    predictor = kind()
    predictor.bind(layer_fakes.model())
    if isinstance(predictor, GateMLP):
        predictor.fit_inputs(layer_fakes.inputs())
    else:
        predictor.fit_model()
    save_artifact(predictor, tmp_path / "a", spec=predictor.fitted_spec(), parents={})
    trace = write_npz(tmp_path / "x.npz")  # that it is another model's matters less
    capsys.readouterr()  # of the fit
    monkeypatch.setattr(sys, "argv", ["x", f"artifact={tmp_path / 'a'}", f"trace={trace}"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("predictors.evaluate", run_name="__main__")
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith(
        f"error: artifact {tmp_path / 'a'}: {predictor.kind!r} reads router"
    )
    assert "router inputs of a live model, which recorded traces do not hold" in printed.err
    assert printed.err.count("\n") == 1


def test_the_command_needs_nothing_that_only_training_needs(fitted: tuple[Path, Path]) -> None:
    """As a user calls it, in a process of its own."""
    artifact, trace = fitted
    result = subprocess.run(
        [sys.executable, "-m", "predictors.evaluate", f"artifact={artifact}", f"trace={trace}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["kind"] == "previous_token"
