"""The background writer of an MLflow run.

It keeps three promises. No caller waits for the server. An outage loses nothing while the process lives, up to
MAX_QUEUED_BYTES. Each key is logged once per step, also when a reply is lost or a killed training repeats its last steps.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from pipelines.tracking.server import disable_http_retries, is_retryable, one_line

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 1 << 30
BYTES_PER_METRIC = 200  # estimate of a metric's size in the queue
METRICS_PER_REQUEST = 1000  # MLflow's limit
# Families of metrics, by the text before the first "/", whose steps may repeat. The step of an evaluation is its number
# of sampling steps.
REPEATABLE_FAMILIES = ("evaluate",)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, eq=False)
class MetricRow:
    """Metrics of one step. Without a step, the row gets the step after its keys' last one when it is written."""

    metrics: dict[str, float]
    step: int | None
    timestamp_ms: int = field(default_factory=now_ms)

    @property
    def num_bytes(self) -> int:
        """Approximate size in the queue."""
        return BYTES_PER_METRIC * len(self.metrics)

    def __str__(self) -> str:
        return f"metrics {', '.join(self.metrics)} of step {self.step}"

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {"step": self.step, "timestamp_ms": self.timestamp_ms, "metrics": self.metrics}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MetricRow":
        """The inverse of `to_json`."""
        return cls(dict(content["metrics"]), int(content["step"]), int(content["timestamp_ms"]))


@dataclass(frozen=True, eq=False)
class Request:
    """Any other request, safe to repeat. While it fails, entries behind it go first, unless `keeps_its_place`."""

    description: str
    send: Callable[[], object]
    num_bytes: int = 0
    keeps_its_place: bool = False

    def __str__(self) -> str:
        return self.description


Entry = MetricRow | Request


class Outbox:
    """A queue of entries for one run, written in order by one thread. The thread ends when the queue is empty."""

    first_pause_seconds = 1.0
    longest_pause_seconds = 60.0

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._queue: deque[Entry] = deque()  # an entry stays here until it is written
        self._num_bytes = 0
        self._num_dropped = 0
        self._changed = threading.Condition()
        self._retry_now = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_steps: dict[str, int] | None = None  # of every key in the run; the thread reads them once

    def put(self, entry: Entry) -> None:
        """Queues an entry. Drops it if the queue is full; statuses and files are always kept."""
        with self._changed:
            if entry.num_bytes and self._num_bytes + entry.num_bytes > MAX_QUEUED_BYTES:
                if not self._num_dropped:
                    logger.warning("the queue of MLflow run %s is full: dropping %s", self._run_id, entry)
                self._num_dropped += 1
                return
            self._queue.append(entry)
            self._num_bytes += entry.num_bytes
            self._start()

    def rows(self) -> list[MetricRow]:
        """The metrics that are not written yet, in order."""
        with self._changed:
            return [entry for entry in self._queue if isinstance(entry, MetricRow)]

    def flush(self, patience_seconds: float) -> bool:
        """Waits until the queue is empty. After `patience_seconds` it warns and returns False."""
        self._retry_now.set()
        with self._changed:
            if self._changed.wait_for(lambda: not self._queue, timeout=patience_seconds):
                return True
            logger.warning("MLflow run %s still lacks %d entries after %g s, the first: %s",
                           self._run_id, len(self._queue), patience_seconds, self._queue[0])  # fmt: skip
            return False

    def _start(self) -> None:
        if self._thread is None:
            disable_http_retries()
            self._thread = threading.Thread(target=self._work, name="mlflow-outbox", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Writes until the queue is empty. Retries what may succeed later, and drops what MLflow refuses."""
        pause_seconds, is_outage, max_metrics = 0.0, False, METRICS_PER_REQUEST
        while batch := self._next_batch(max_metrics):
            try:
                self._write(batch)
            except Exception as error:
                if is_retryable(error):
                    if not is_outage:
                        logger.warning("cannot write to MLflow run %s, retrying (%s)", self._run_id, one_line(error))
                    is_outage = True
                    self._step_aside(batch[0])
                    pause_seconds = min(max(2 * pause_seconds, self.first_pause_seconds), self.longest_pause_seconds)
                    if self._retry_now.wait(pause_seconds):
                        self._retry_now.clear()
                        pause_seconds = 0.0
                    continue
                if len(batch) > 1:  # MLflow stored none of them; look for the refused one
                    max_metrics = 1
                    continue
                logger.warning("MLflow run %s refused %s: %s", self._run_id, batch[0], one_line(error))
                max_metrics = METRICS_PER_REQUEST
            self._remove(batch)
        if is_outage:
            logger.info("MLflow run %s has caught up", self._run_id)

    def _next_batch(self, max_metrics: int) -> list[Entry]:
        """The head of the queue: one request, or the metric rows that fit into one. Ends the thread if it is empty."""
        with self._changed:
            batch: list[Entry] = []
            num_metrics = 0
            for entry in self._queue:
                if isinstance(entry, Request):
                    return batch or [entry]
                num_metrics += len(entry.metrics)
                if batch and num_metrics > max_metrics:
                    break
                batch.append(entry)
            if not batch:
                self._thread = None
            return batch

    def _step_aside(self, entry: Entry) -> None:
        """Moves a failing upload to the end, so that metrics do not wait for an artifact store that fails alone."""
        if isinstance(entry, Request) and not entry.keeps_its_place:
            with self._changed:
                self._queue.rotate(-1)

    def _remove(self, batch: list[Entry]) -> None:
        with self._changed:
            for entry in batch:
                self._queue.popleft()
                self._num_bytes -= entry.num_bytes
            if self._num_dropped and not self._queue:
                logger.warning("MLflow run %s lost %d entries to a full queue", self._run_id, self._num_dropped)
                self._num_dropped = 0
            self._changed.notify_all()

    def _write(self, batch: list[Entry]) -> None:
        if isinstance(batch[0], Request):
            batch[0].send()
            return
        if self._last_steps is None:
            # A run's data has the last step of each key; get_metric_history would read every point.
            data = self._client.get_run(self._run_id).data.to_proto()
            self._last_steps = {metric.key: metric.step for metric in data.metrics}
        last_steps, metrics = dict(self._last_steps), []
        for row in batch:
            assert isinstance(row, MetricRow)
            step = row.step if row.step is not None else 1 + max(last_steps.get(key, -1) for key in row.metrics)
            for key, value in row.metrics.items():
                if key.split("/")[0] in REPEATABLE_FAMILIES or step > last_steps.get(key, step - 1):
                    metrics.append(Metric(key, value, row.timestamp_ms, step))
                    last_steps[key] = step
        if metrics:
            # Stored whole or not at all. If only the reply is lost, the retry sends equal metrics, which MLflow ignores.
            self._client.log_batch(self._run_id, metrics=metrics)
        self._last_steps = last_steps
