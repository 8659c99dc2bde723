"""Metrics for Prometheus, in a registry of their own."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# The names in `Engine.stats`, whether they only grow, and what they are.
_ENGINE_METRICS = {
    "tokens_read": (True, "Tokens read by sessions, without prompts that do not become part of one"),
    "tokens_written": (True, "Tokens generated"),
    "steps": (True, "Steps of the model, each shared by all running requests"),
    "sessions_in_memory": (False, "Sessions in memory"),
    "sessions_on_disk": (False, "Sessions on disk"),
    "bytes_in_memory": (False, "Memory taken by sessions, in bytes"),
    "running": (False, "Running read and generation requests"),
}


class ServiceMetrics(Collector):
    """The metrics of the service. engine_stats: `Engine.stats`, called whenever the metrics are collected."""

    def __init__(self, engine_stats: Callable[[], Mapping[str, float]]) -> None:
        self._engine_stats = engine_stats
        self._registry = CollectorRegistry()
        self._registry.register(self)
        labels = ("method", "route", "status")
        self._requests = Counter(
            "ttt_e2e_requests", "Requests by path template and status", labels, registry=self._registry
        )
        self._request_seconds = Histogram(
            "ttt_e2e_request_seconds",
            "Seconds from the first byte of a request to the last of its response",
            ("route",),
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
            registry=self._registry,
        )
        self._token_seconds = Histogram(
            "ttt_e2e_token_seconds",
            "Seconds between two tokens of a response",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self._registry,
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def observe_tokens(self, count: int, seconds: float) -> None:
        """Count tokens that were generated together, `seconds` after the token before them."""
        for _ in range(count):
            self._token_seconds.observe(seconds / count)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's metrics."""
        stats = self._engine_stats()
        for name, (only_grows, description) in _ENGINE_METRICS.items():
            family = CounterMetricFamily if only_grows else GaugeMetricFamily
            yield family(f"ttt_e2e_{name}", description, value=stats[name])

    def describe(self) -> list[Metric]:
        """Nothing: otherwise the registry would call the engine before it is started."""
        return []
