"""What the server counts, for Prometheus."""

from __future__ import annotations

import functools
import os
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where several processes keep what they count, so that each can tell the sum
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


def forget(pid: int) -> None:
    """Take a process that died out of the gauges; what it counted stays."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]


@functools.cache  # Prometheus' own look-up takes about a microsecond, and there are few sets of labels
def _of(metric: Metric, *labels: str) -> Metric:
    return metric.labels(*labels)


class Metrics:
    """The counters of one server; with ``SHARED`` in the environment, of all processes that share that folder."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("toolkit_requests", "Answers sent", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "toolkit_request_seconds", "From the headers to the answer", ["path"], buckets=SECONDS, registry=registry
        )
        self._rejects = Counter("toolkit_rejects", "Answers that are errors", ["reason"], registry=registry)
        self._batches = Histogram(
            "toolkit_batch_images", "Images that ran together", ["artifact"], buckets=IMAGES, registry=registry
        )
        self._waiting = Gauge(
            "toolkit_queue_images",
            "Images that wait to be decoded, or for the model",
            ["artifact"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._provider = Gauge(
            "toolkit_provider",
            "1 for the provider that runs the artifact",
            ["artifact", "provider"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._reloads = Counter(
            "toolkit_reloads", "Artifacts that changed on disk", ["artifact", "result"], registry=registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        _of(self._requests, path, str(status)).inc()
        _of(self._seconds, path).observe(seconds)

    def reject(self, reason: str) -> None:
        _of(self._rejects, reason).inc()

    def batch(self, artifact: str, images: int) -> None:
        _of(self._batches, artifact).observe(images)

    def waiting(self, artifact: str, change: int) -> None:
        _of(self._waiting, artifact).inc(change)

    def provider(self, artifact: str, provider: str) -> None:
        _of(self._provider, artifact, provider).set(1)

    def reload(self, artifact: str, result: str) -> None:
        _of(self._reloads, artifact, result).inc()

    def text(self) -> bytes:
        """All counters, in Prometheus' text format."""
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
