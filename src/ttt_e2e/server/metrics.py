"""Numbers for Prometheus, in a registry of their own."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
# What the engine counts, and whether it only ever grows.
_ENGINE = {
    "tokens_read": (True, "Tokens that sessions read, without prompts that they do not keep"),
    "tokens_written": (True, "Tokens that were written"),
    "steps": (True, "Steps of the model, each shared by all sessions at work"),
    "sessions_in_memory": (False, "Sessions in memory"),
    "sessions_on_disk": (False, "Sessions on the disk"),
    "bytes_in_memory": (False, "Bytes of the sessions in memory"),
    "running": (False, "Readings and generations that are at work"),
}


class Metrics:
    """The service's numbers. engine: what `Engine.numbers` gives, asked whenever they are looked at."""

    def __init__(self, engine: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(engine))
        self._requests = Counter(
            "ttt_e2e_requests",
            "Requests by address (as a template) and status",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "ttt_e2e_request_seconds",
            "Seconds from a request's first byte to its answer's last",
            ("route",),
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
            registry=self._registry,
        )
        self._token_seconds = Histogram(
            "ttt_e2e_token_seconds",
            "Seconds between two tokens that one request is sent",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self._registry,
        )

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that is done."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, count: int, seconds: float) -> None:
        """Count tokens that came `seconds` after the one before them; of several, each took its share."""
        for _ in range(count):
            self._token_seconds.observe(seconds / count)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    def __init__(self, numbers: Callable[[], Mapping[str, float]]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        numbers = self._numbers()
        for name, (grows, what) in _ENGINE.items():
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(f"ttt_e2e_{name}", what, value=numbers[name])

    def describe(self) -> list[Metric]:
        return []  # or the registry would ask an engine that has not been started yet
