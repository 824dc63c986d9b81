"""What an offload counts is what Prometheus is shown: each figure, and each way to be slower."""

from typing import Any, cast

from prometheus_client import CollectorRegistry

from runtime.backend import OffloadStats
from runtime.server.metrics import ExpertCollector
from tests.runtime.server.fakes import FakeOffload

NOTHING: dict[str, Any] = dict.fromkeys(
    ("hits", "misses", "streamed", "evictions", "miss_bytes", "stall_s"), 0
)


def shown(**counted: Any) -> dict[str, float]:
    """The samples of such stats by name and labels, the model's left out."""
    offload = FakeOffload()
    offload.counted = OffloadStats(**{**NOTHING, **counted})
    registry = CollectorRegistry()
    registry.register(ExpertCollector(cast(Any, offload), model_name="m"))
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "m"
            key = ",".join(f"{k}={v}" for k, v in labels.items())
            name = sample.name.removeprefix("moecast_expert_")
            found[f"{name}{{{key}}}" if key else name] = sample.value
    return found


def test_a_predictor_that_follows_no_requests_is_seen() -> None:
    assert shown(predictor="p")["predictor_forgets{predictor=p}"] == 0
    assert shown(predictor="p", predictor_forgets=True)["predictor_forgets{predictor=p}"] == 1
    assert not any(name.startswith("predictor") for name in shown())
