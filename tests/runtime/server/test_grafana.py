"""The Grafana board asks for metrics, labels and types that a server really exposes."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from runtime.server.expert_counts import Counted
from runtime.server.metrics import ExpertCollector
from runtime.server.objectives import Objectives
from tests.runtime.server.clients import NAME
from tests.runtime.server.dashboard_pages import served
from tests.runtime.server.fakes import NOTHING, WAIT_S, FakeOffload

BOARD = Path(__file__).parents[3] / "deploy" / "grafana.json"
NAMES = re.compile(r"\b(?:vllm:|moecast_)\w+")
LABELS = re.compile(r"\b(?:by|without|ignoring) ?\((\w+)\)|\{\{(\w+)\}\}")


class Exposed(NamedTuple):
    """A sample of /metrics."""

    type: str
    labels: set[str]
    value: float


@pytest.fixture(scope="module")
def board() -> Any:
    return json.loads(BOARD.read_text())


@pytest.fixture(scope="module")
def exposed() -> dict[str, Exposed]:
    """Every sample of a server with predictor and objectives, and those of a lossy one."""
    with served(objectives=Objectives(ttft_s=60.0)) as (url, _):
        body = {"model": NAME, "prompt": "hi", "max_tokens": 3}
        httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S).raise_for_status()
        text = httpx.get(f"{url}/metrics").text
    counted = dataclasses.replace(NOTHING, mode="resident_only", requests_of_task={"code": 1})
    collector = ExpertCollector(
        cast(Any, FakeOffload()), counts=lambda: Counted(counted, 0.0), model_name=NAME
    )
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        sample.name: Exposed(family.type, set(sample.labels), sample.value)
        for text in (generate_latest(registry).decode(), text)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_judged_and_foreseen_experts_are_counted_apart(exposed: Any) -> None:
    """Three tokens are two decoded ones, each of 4 experts in 8 layers; neighbours differ."""
    assert exposed["moecast_expert_forecast_judged_total"].value == 2 * 8 * 4
    assert 0 < exposed["moecast_expert_forecast_foreseen_total"].value < 2 * 8 * 4


def targets(board: Any) -> list[dict[str, str]]:
    return [target for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_of_the_board_is_exposed(board: Any, exposed: Any) -> None:
    asked = {name for target in targets(board) for name in NAMES.findall(target["expr"])}
    asked |= set(NAMES.findall(json.dumps(board["templating"])))
    assert len(asked) >= 20
    assert asked <= set(exposed)


def test_every_expert_metric_is_on_the_board(board: Any, exposed: Any) -> None:
    """What nobody else's dashboard has; the age is 0 wherever this board's server can be tried."""
    ours = {name for name in exposed if name.startswith("moecast_")}
    asked = {name for target in targets(board) for name in NAMES.findall(target["expr"])}
    assert ours - asked == {"moecast_expert_forecast_age_tokens_total"}


def test_only_counters_have_rates_and_only_gauges_have_none(board: Any, exposed: Any) -> None:
    for target in targets(board):
        expr = target["expr"]
        for found in NAMES.finditer(expr):
            before = expr[: found.start()]
            is_counted = before.endswith(("rate(", "increase("))
            assert (exposed[found.group()].type != "gauge") == is_counted, expr


def test_every_label_of_the_board_is_one_of_its_metric(board: Any, exposed: Any) -> None:
    for target in targets(board):
        has = set().union(*(exposed[name].labels for name in NAMES.findall(target["expr"])))
        text = f"{target['expr']} {target['legendFormat']}"
        asked = {a or b for a, b in LABELS.findall(text)}
        assert asked <= has, text
        assert 'model_name=~"$model"' in target["expr"]


def test_panels_have_ids_of_their_own_and_do_not_overlap(board: Any) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
