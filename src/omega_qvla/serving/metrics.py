"""What a server counts and measures, as Prometheus text."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.registry import Collector

from omega_qvla.serving.refusal import Reason

__all__ = ["CONTENT_TYPE", "Metrics", "Recent"]

_WINDOW = 1024
_QUANTILES = (0.5, 0.95, 0.99)


class Recent(Collector):
    """Quantiles of the last seconds that were observed, and the number and sum of all; a summary of Prometheus."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._name, self._documentation = name, documentation
        self._lock, self._window = threading.Lock(), deque[float](maxlen=_WINDOW)
        self._count, self._sum = 0, 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._window.append(seconds)
            self._count, self._sum = self._count + 1, self._sum + seconds

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            window, count, total = list(self._window), self._count, self._sum
        metric = Metric(self._name, self._documentation, "summary")
        values = np.quantile(window, _QUANTILES) if window else [float("nan")] * len(_QUANTILES)
        for quantile, value in zip(_QUANTILES, values, strict=True):
            metric.add_sample(self._name, {"quantile": str(quantile)}, float(value))
        metric.add_sample(f"{self._name}_count", {}, count)
        metric.add_sample(f"{self._name}_sum", {}, total)
        yield metric


class Metrics:
    """One server's; every server of a process has its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.answered = Counter("omega_qvla_answered", "Observations answered with actions.", registry=registry)
        self.refused = Counter("omega_qvla_refused", "What clients were refused.", ["reason"], registry=registry)
        for reason in get_args(Reason):
            self.refused.labels(reason)
        self.dropped = Counter(
            "omega_qvla_dropped", "Accepted observations whose client left before their turn.", registry=registry
        )
        self.deadline_misses = Counter(
            "omega_qvla_deadline_misses", "Observations not answered within the deadline.", registry=registry
        )
        self.inference = Recent("omega_qvla_inference_seconds", "What the policy takes for a chunk.", registry)
        self.answer = Recent(
            "omega_qvla_answer_seconds", "From a whole message received to its actions, waiting included.", registry
        )

    def gauge(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Show what `value` returns whenever the metrics are read."""
        Gauge(f"omega_qvla_{name}", documentation, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
