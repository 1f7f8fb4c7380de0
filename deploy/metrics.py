"""What Prometheus learns of the endpoint, on the metrics port of every Ray node, as `ray_meanflow_...`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Metric:
    """One metric's definition."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    # The HTTP side.
    "meanflow_requests_total": Metric(
        "counter", "Answers, by route, method and status.", ("route", "method", "status")
    ),
    "meanflow_request_seconds": Metric("histogram", "From a request's arrival to its answer.", ("route",), SECONDS),
    "meanflow_encode_seconds": Metric("histogram", "Encoding of a request's images.", (), SECONDS),
    "meanflow_settings_refused": Metric(
        "gauge", "1 while a setting of the HTTP side that was asked for is not in use."
    ),
    # The generator's side.
    "meanflow_images_total": Metric("counter", "Images made."),
    "meanflow_refused_total": Metric("counter", "Requests that the generator refused, by code.", ("code",)),
    "meanflow_batch_rows": Metric("histogram", "Images in a batch.", (), ROWS),
    "meanflow_queue_wait_seconds": Metric("histogram", "An image's wait for its batch.", (), SECONDS),
    "meanflow_model_seconds": Metric("histogram", "Network calls of a batch.", (), SECONDS),
    "meanflow_decode_seconds": Metric("histogram", "Decoding of a batch.", (), SECONDS),
    "meanflow_queued_images": Metric("gauge", "Images that wait."),
    "meanflow_out_of_memory_total": Metric("counter", "Batches that did not fit and were halved."),
    "meanflow_model_refused": Metric(
        "gauge", "1 while a model that was asked for is not in use and an older one serves."
    ),
}


class Recorder(Protocol):
    """Where figures go."""

    def record(self, name: str, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter, sets a gauge, or observes for a histogram."""


class RayRecorder:
    """Ray Serve's metrics, tagged with deployment, replica and application."""

    def __init__(self) -> None:
        from ray.serve import metrics

        self._metrics = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                made = metrics.Histogram(
                    name, metric.description, boundaries=list(metric.boundaries), tag_keys=metric.tags
                )
                self._metrics[name] = made.observe
            elif metric.kind == "gauge":
                self._metrics[name] = metrics.Gauge(name, metric.description, tag_keys=metric.tags).set
            else:
                self._metrics[name] = metrics.Counter(name, metric.description, tag_keys=metric.tags).inc

    def record(self, name: str, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """As Recorder says. A counter is not told 0, which Ray refuses."""
        if value or METRICS[name].kind != "counter":
            self._metrics[name](value, tags=dict(tags or {}))
