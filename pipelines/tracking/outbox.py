"""The background writer of an MLflow run.

It guarantees the following:

- Callers never wait for the server.
- An outage loses no data while the process is alive, up to MAX_QUEUED_BYTES.
- Each key is logged at most once per step, even if a reply is lost or a resumed training run repeats its last steps.
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
# Key prefixes (the text before the first "/") of metrics whose steps may repeat. The step of an evaluation is its number
# of sampling steps.
REPEATABLE_PREFIXES = ("evaluate",)


def now_ms() -> int:
    """Milliseconds since the Unix epoch, the unit of MLflow's timestamps."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, eq=False)
class MetricRow:
    """Metrics of one step. If `step` is None, the writer assigns the next step after the last one of these keys."""

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
    """Any other request; must be idempotent.

    While it fails, later entries are written first, unless `is_ordered`.
    """

    description: str
    send: Callable[[], object]
    num_bytes: int = 0
    is_ordered: bool = False

    def __str__(self) -> str:
        return self.description


Entry = MetricRow | Request


class Outbox:
    """A queue of entries for one run. A thread writes them in order and ends when the queue is empty."""

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
        self._last_steps: dict[str, int] | None = None  # {key: last step in the run}, read once by the thread

    def put(self, entry: Entry) -> None:
        """Queues an entry. Drops it if the queue is full, except for statuses and files."""
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
        """The unwritten metrics, in order."""
        with self._changed:
            return [entry for entry in self._queue if isinstance(entry, MetricRow)]

    def flush(self, patience_seconds: float) -> bool:
        """Waits until the queue is empty. Logs a warning and returns False after `patience_seconds`."""
        self._retry_now.set()
        with self._changed:
            if self._changed.wait_for(lambda: not self._queue, timeout=patience_seconds):
                return True
            logger.warning("MLflow run %s: %d entries are not written after %g s, the first: %s",
                           self._run_id, len(self._queue), patience_seconds, self._queue[0])  # fmt: skip
            return False

    def _start(self) -> None:
        if self._thread is None:
            disable_http_retries()
            self._thread = threading.Thread(target=self._work, name="mlflow-outbox", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Writes until the queue is empty. Retries temporary failures and drops entries that MLflow refuses."""
        pause_seconds, is_outage, max_metrics = 0.0, False, METRICS_PER_REQUEST
        while batch := self._next_batch(max_metrics):
            try:
                self._write(batch)
            except Exception as error:
                if is_retryable(error):
                    if not is_outage:
                        logger.warning("cannot write to MLflow run %s, retrying (%s)", self._run_id, one_line(error))
                    is_outage = True
                    self._move_to_end(batch[0])
                    pause_seconds = min(max(2 * pause_seconds, self.first_pause_seconds), self.longest_pause_seconds)
                    if self._retry_now.wait(pause_seconds):
                        self._retry_now.clear()
                        pause_seconds = 0.0
                    continue
                if len(batch) > 1:  # MLflow stored none of them; retry them one by one to find the refused one
                    max_metrics = 1
                    continue
                logger.warning("MLflow run %s refused %s: %s", self._run_id, batch[0], one_line(error))
                max_metrics = METRICS_PER_REQUEST
            self._remove(batch)
        if is_outage:
            logger.info("MLflow run %s has caught up", self._run_id)

    def _next_batch(self, max_metrics: int) -> list[Entry]:
        """The head of the queue: one request, or as many metric rows as one request can contain.

        If the queue is empty, clears `_thread`, so that the next entry starts a new thread.
        """
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

    def _move_to_end(self, entry: Entry) -> None:
        """Moves a failing upload to the end of the queue, so that an artifact store outage does not delay metrics."""
        if isinstance(entry, Request) and not entry.is_ordered:
            with self._changed:
                self._queue.rotate(-1)

    def _remove(self, batch: list[Entry]) -> None:
        with self._changed:
            for entry in batch:
                self._queue.popleft()
                self._num_bytes -= entry.num_bytes
            if self._num_dropped and not self._queue:
                logger.warning(
                    "MLflow run %s lost %d entries because the queue was full", self._run_id, self._num_dropped
                )
                self._num_dropped = 0
            self._changed.notify_all()

    def _write(self, batch: list[Entry]) -> None:
        if isinstance(batch[0], Request):
            batch[0].send()
            return
        if self._last_steps is None:
            # The run's data contains the last step of each key; get_metric_history would fetch the whole history.
            data = self._client.get_run(self._run_id).data.to_proto()
            self._last_steps = {metric.key: metric.step for metric in data.metrics}
        last_steps, metrics = dict(self._last_steps), []
        for row in batch:
            assert isinstance(row, MetricRow)
            step = row.step if row.step is not None else 1 + max(last_steps.get(key, -1) for key in row.metrics)
            for key, value in row.metrics.items():
                if key.split("/")[0] in REPEATABLE_PREFIXES or step > last_steps.get(key, step - 1):
                    metrics.append(Metric(key, value, row.timestamp_ms, step))
                    last_steps[key] = step
        if metrics:
            # All or nothing. If only the reply is lost, the retry sends identical metrics, which MLflow ignores.
            self._client.log_batch(self._run_id, metrics=metrics)
        self._last_steps = last_steps
