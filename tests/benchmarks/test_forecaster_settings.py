"""The forecaster's benchmark: what it says is unseen, or unknown, is."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.forecaster import settings_of, with_past_ids
from data.schema import TraceList
from predictors.forecaster import Forecaster
from tests.predictors.fakes import SPEC, make_trace, make_traces, random_traces

ROOT = Path(__file__).resolve().parent.parent.parent


def test_with_past_ids_no_forecast_depends_on_the_next_tokens_id() -> None:
    predictor = Forecaster(
        hidden_dim=16,
        epochs=1,
        trainer={"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    )
    predictor.fit(with_past_ids(random_traces()))
    experts = [0, 1, 0, 2, 1, 0, 0, 1]

    def said(tokens: list[int]) -> list[list[float]]:
        trace = with_past_ids(make_traces({"test": [make_trace("t", experts, tokens=tokens)]}))[0]
        walked = predictor.walk(trace).forecasts
        return [one.next_LE.flatten().tolist() for one in walked if one is not None]

    one, other = said([0, 1, 0, 2, 1, 0, 0, 1]), said([0, 1, 0, 2, 1, 3, 0, 1])
    changed = [a != b for a, b in zip(one, other, strict=True)]
    # Token 5's id changed: the forecast of row 5 does not know it, that of row 6 does.
    assert changed[:7] == [False] * 6 + [True]


def test_esft_is_tested_on_a_domain_that_was_not_fitted() -> None:
    traces = TraceList(
        spec=SPEC,
        traces=[
            make_trace(f"{domain}{n}", [0, 1, 2], topic=domain)
            for domain in ("intent", "law")
            for n in range(10)
        ],
        split={},
        digest="fake",
    )
    settings = settings_of(traces, "esft", 0)
    assert list(settings) == ["esft, tested on intent", "esft, tested on law"]
    for name, setting in settings.items():
        tested = {t.topic for t in setting.traces if setting.split[t.request_id] == "test"}
        fitted = {t.topic for t in setting.traces if setting.split[t.request_id] != "test"}
        assert tested == {name.split()[-1]}
        assert not tested & fitted


def test_each_token_bears_the_id_of_the_one_before() -> None:
    trace = make_trace("t", [0, 1])
    moved = with_past_ids(make_traces({"fit": [trace]}))[0]
    assert moved.token_ids_P is not None
    assert np.array_equal(moved.token_ids_P, [-1, 0])


def test_it_loads_where_only_torch_and_lightning_are() -> None:
    absent = ["hydra", "pydantic", "fastapi", "datasets", "wandb", "faiss"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\nimport benchmarks.forecaster\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
