"""What became of requests' objectives, for Prometheus: ``moecast_slo_*``, read at each scrape.

Knows nothing of how objectives are kept.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from runtime.server.objectives import VERDICTS, Objectives


class ObjectiveCollector(Collector):
    """Shows what `Objectives` counts itself.

    Args:
        objectives: Whose.
        model_name: Label of every metric.
    """

    def __init__(self, objectives: Objectives, *, model_name: str) -> None:
        self._objectives = objectives
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        objectives = self._objectives
        ruling = GaugeMetricFamily(
            "moecast_slo_ruling",
            "1 where objectives decide who is taken, 0 where sequences run as they come.",
            labels=("model_name",),
        )
        ruling.add_metric([self._model_name], float(objectives.is_ruling))
        yield ruling
        factor = GaugeMetricFamily(
            "moecast_slo_cost_factor",
            "What the latest steps took over what their costs say, as measured at the start.",
            labels=("model_name",),
        )
        factor.add_metric([self._model_name], objectives.cost_factor)
        yield factor
        requests = CounterMetricFamily(
            "moecast_slo_requests",
            "Requests with an objective that are over, by whether it was kept or how it was not.",
            labels=("model_name", "task", "verdict"),
        )
        counts = dict(objectives.counts)  # the engine's thread goes on counting
        for task in sorted({"", *(task for task, _ in counts)}):
            for verdict in VERDICTS:
                requests.add_metric(
                    [self._model_name, task, verdict], counts.get((task, verdict), 0)
                )
        yield requests
        yield self._counter(
            "overtaken",
            "Times that a waiting request was overtaken by a later arrival.",
            objectives.num_overtaken,
        )
        yield self._counter(
            "estimates",
            "Answered requests whose times were estimated when they were taken.",
            objectives.num_estimates,
        )
        errors = CounterMetricFamily(
            "moecast_slo_estimate_error_seconds",
            "Seconds that those estimates were off, summed.",
            labels=("model_name", "of"),
        )
        errors.add_metric([self._model_name, "first_token"], objectives.first_token_error_s)
        errors.add_metric([self._model_name, "end"], objectives.end_error_s)
        yield errors

    def _counter(self, name: str, text: str, value: int) -> Metric:
        counter = CounterMetricFamily(f"moecast_slo_{name}", text, labels=("model_name",))
        counter.add_metric([self._model_name], value)
        return counter
