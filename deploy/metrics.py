"""The endpoint's Prometheus metrics, exported on the metrics port of every Ray node as `ray_meanflow_...`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Metric:
    """Definition of a metric."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


def _seconds(description: str, *tags: str) -> Metric:
    return Metric("histogram", description, tags, SECONDS_BUCKETS)


METRICS: dict[str, Metric] = {
    # Recorded by the HTTP API.
    "meanflow_requests_total": Metric(
        "counter", "Responses by route, method and status.", ("route", "method", "status")
    ),
    "meanflow_request_seconds": _seconds("Time from a request's arrival to its response.", "route"),
    "meanflow_encode_seconds": _seconds("Encoding time of a request's images."),
    # Recorded by the HTTP API and by the generator.
    "meanflow_settings_refused": Metric(
        "gauge",
        "1 while settings of a part (api, generator) are refused and the previous ones remain in use.",
        ("part",),
    ),
    # Recorded by the generator.
    "meanflow_model_refused": Metric(
        "gauge", "1 while the requested model fails to load and another one is being served."
    ),
    "meanflow_images_total": Metric("counter", "Generated images."),
    "meanflow_refused_total": Metric("counter", "Requests that the generator refused, by code.", ("code",)),
    "meanflow_batch_rows": Metric("histogram", "Images per batch.", (), BATCH_SIZE_BUCKETS),
    "meanflow_queue_wait_seconds": _seconds("Time an image waits for its batch."),
    "meanflow_model_seconds": _seconds("Network time of a batch."),
    "meanflow_decode_seconds": _seconds("Decoding time of a batch."),
    "meanflow_queued_images": Metric("gauge", "Queued images."),
    "meanflow_out_of_memory_total": Metric("counter", "Batches that ran out of device memory and were halved."),
}


class Recorder(Protocol):
    """Interface for recording metric values."""

    def record(self, name: str, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter, sets a gauge, or adds an observation to a histogram."""


class RayRecorder:
    """Records metrics with Ray Serve, which adds the tags deployment, replica and application."""

    def __init__(self) -> None:
        from ray.serve import metrics

        self._record = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                boundaries = list(metric.boundaries)
                histogram = metrics.Histogram(name, metric.description, boundaries=boundaries, tag_keys=metric.tags)
                self._record[name] = histogram.observe
            elif metric.kind == "gauge":
                self._record[name] = metrics.Gauge(name, metric.description, tag_keys=metric.tags).set
            else:
                self._record[name] = metrics.Counter(name, metric.description, tag_keys=metric.tags).inc

    def record(self, name: str, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Records a value. Skips zeros for counters, because Ray rejects them."""
        if value or METRICS[name].kind != "counter":
            self._record[name](value, tags=dict(tags or {}))
