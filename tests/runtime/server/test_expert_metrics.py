"""What an offload counts is what Prometheus is shown: each figure, and each way to be slower."""

import dataclasses
from typing import Any, cast

from prometheus_client import CollectorRegistry

from runtime.backend import OffloadStats
from runtime.server.expert_counts import Counted
from runtime.server.metrics import ExpertCollector
from tests.runtime.server.fakes import FakeOffload

NOTHING: dict[str, Any] = dict.fromkeys(
    ("hits", "misses", "streamed", "evictions", "miss_bytes", "stall_s"), 0
)


def shown(**counted: Any) -> dict[str, float]:
    """The samples of such stats by name and labels, the model's left out."""
    said = Counted(OffloadStats(**{**NOTHING, **counted}), age_s=0.0)
    registry = CollectorRegistry()
    offload = cast(Any, FakeOffload())
    registry.register(ExpertCollector(offload, counts=lambda: said, model_name="m"))
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "m"
            key = ",".join(f"{k}={v}" for k, v in labels.items())
            name = sample.name.removeprefix("moecast_expert_")
            found[f"{name}{{{key}}}" if key else name] = sample.value
    return found


def test_whatever_an_offload_counts_is_shown() -> None:
    """Each field of `OffloadStats` changes a sample: whoever adds one adds its metric."""
    device: dict[str, Any] = {"is_pinned": True, "cpu_lane_on": True, "predictor": "p"}
    device |= {"mode": "resident_only", "judged_experts": 1, "foreseen_experts": 1}
    others: dict[str, Any] = {"requests_of_task": {"code": 2}, "eager_calls": {"labels": 3}}
    others |= {"predictor": None, "mode": "lossless"}
    for field in dataclasses.fields(OffloadStats):
        changed: Any = others.get(field.name, 7)
        if field.name in ("is_pinned", "cpu_lane_on"):
            changed = False
        if field.name in ("predictor_failed", "predictor_forgets"):
            changed = True
        assert shown(**{**device, field.name: changed}) != shown(**device), field.name


def test_a_cpu_shows_nothing_of_a_device() -> None:
    assert set(shown()) == {
        "cache_hits_total",
        "cache_misses_total{reason=loaded}",
        "cache_misses_total{reason=streamed}",
        "cache_evictions_total",
        "miss_bytes_total",
        "stall_seconds_total",
        "cache_capacity_bytes",
        "counters_age_seconds",
    }


def test_each_way_for_a_gpu_to_be_slower_has_a_figure() -> None:
    found = shown(
        is_pinned=False,
        cpu_lane_on=False,
        prefetch_layers_off=2,
        eager_calls={"several tokens a row": 5, "labels": 1},
    )
    assert found["memory_pinned"] == found["cpu_lane_on"] == 0
    assert found["prefetch_layers_off"] == 2
    assert found["eager_calls_total{reason=several tokens a row}"] == 5
    assert found["eager_calls_total{reason=labels}"] == 1


def test_a_predictor_that_follows_no_requests_is_seen() -> None:
    assert shown(predictor="p")["predictor_forgets{predictor=p}"] == 0
    assert shown(predictor="p", predictor_forgets=True)["predictor_forgets{predictor=p}"] == 1
    assert not any(name.startswith("predictor") for name in shown())
