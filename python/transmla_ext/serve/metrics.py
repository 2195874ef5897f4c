"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime import Engine

__all__ = ["Metrics"]

_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """Counters and histograms of one server, in a registry of its own; what the engine knows is asked of it."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "transmla_requests",
            "Requests that have ended: completed, refused (4xx), disconnected, timeout, failed (5xx).",
            ["outcome"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter("transmla_prompt_tokens", "Tokens of admitted prompts.", registry=self.registry)
        self.first_token_seconds = Histogram(
            "transmla_time_to_first_token_seconds",
            "From a request's arrival in the queue to its first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.token_seconds = Histogram(
            "transmla_time_per_output_token_seconds",
            "From each token of a request to the next.",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats, pool = self._engine.stats, self._engine.model.cache.pool
        gauges = {
            "requests_running": ("Requests in the batch.", self._engine.num_running),
            "requests_waiting": ("Requests that wait for room.", self._engine.num_waiting),
            "cache_blocks": ("Pages of the cache.", pool.num_blocks),
            "cache_blocks_free": ("Pages that no request has.", pool.num_free),
        }
        counters = {
            "generated_tokens": ("Tokens drawn.", stats.generated_tokens),
            "computed_tokens": ("Tokens that went through the model.", stats.computed_tokens),
            "shared_tokens": ("Tokens of prompts that were in the cache already.", stats.shared_tokens),
            "preemptions": ("Requests set back because pages ran out.", stats.preemptions),
        }
        for name, (help_, value) in gauges.items():
            yield GaugeMetricFamily(f"transmla_{name}", help_, value)
        for name, (help_, value) in counters.items():
            yield CounterMetricFamily(f"transmla_{name}", help_, value)
