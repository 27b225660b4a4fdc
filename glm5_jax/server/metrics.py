"""What `/metrics` shows, in the format of Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glm5_jax.inference.request import Statistics

_GAUGES = {
    "slots": "Requests that are continued at a time.",
    "running": "Requests that are continued now.",
    "waiting": "Requests that wait for a slot.",
    "pages": "Pages of the cache.",
    "pages_held": "Pages that running requests hold.",
    "pages_kept": "Pages kept for prompts that begin like one before.",
}
_COUNTERS = {
    "finished": "Requests that ended, cancelled ones too.",
    "prompt_tokens": "Tokens of prompts of requests that were begun.",
    "reused_tokens": "Tokens of prompts that were in the cache already.",
    "generated_tokens": "Tokens generated.",
    "main_steps": "Steps of rows through the whole model.",
    "drafted_tokens": "Tokens that were drafted.",
    "accepted_tokens": "Drafted tokens that the model agreed with.",
    "compilations": "Steps compiled.",
}
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Metrics(Collector):
    """Counts what the server does, and shows what the engine last said of itself."""

    def __init__(self, statistics: Statistics):
        self._registry = CollectorRegistry()
        self._statistics = statistics
        self.requests = Counter(
            "glm5_http_requests",
            "HTTP requests answered.",
            ("route", "status"),
            registry=self._registry,
        )
        self.first_token = Histogram(
            "glm5_time_to_first_token_seconds",
            "Time from a request to its first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.per_token = Histogram(
            "glm5_time_per_token_seconds",
            "Mean time between the tokens of a continuation.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._registry.register(self)

    def show(self, statistics: Statistics) -> None:
        """Replaces what is shown of the engine; may be called in any thread."""
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for."""
        shown = vars(self._statistics) | self._statistics.work._asdict()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"glm5_{name}", text, value=shown[name])
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"glm5_{name}", text, value=shown[name])

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
