"""What is still to be written to an MLflow run: kept in order, and written by one thread for as long as it takes.

A training does not wait for its tracking server and does not end with it. Metrics are one lane and pictures and files
another, so that metrics do not queue behind an artifact store that fails alone.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from PIL import Image

logger = logging.getLogger(__name__)

MAX_ROWS = 100_000  # of metrics: about 100 MB
MAX_PICTURES = 64
METRICS_PER_REQUEST = 1000  # MLflow's limit
# A metric of these families, the text before the first "/", may have a step again: an evaluation's step is its number
# of sampling steps, and a later evaluation has the same ones.
REPEATABLE_FAMILIES = ("evaluate",)
_FINAL_ERROR_CODES = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_PASSING_STATUS = (401, 403, 408, 409, 425, 429)  # a token can be renewed, a conflict and a limit pass


def now_ms() -> int:
    """Milliseconds since 1970, MLflow's time."""
    return time.time_ns() // 1_000_000


def try_requests_once() -> None:
    """Has MLflow try a request once, unless the user decided: its own 7 retries take 4 minutes and fill the log.

    For the whole process, since MLflow knows no other place for it. And no progress bars in a job's log.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: an unreachable or failing server, not a refused value."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        if status == 404:  # of the endpoint: another server, or a proxy without one behind it
            return error.error_code not in _FINAL_ERROR_CODES
        return status in _PASSING_STATUS or (status >= 500 and status != 501)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in _PASSING_STATUS or error.response.status_code >= 500
    if isinstance(error, requests.RequestException):
        return True
    return not isinstance(error, (ValueError, TypeError, FileNotFoundError, IsADirectoryError, PermissionError))


def brief(error: Exception) -> str:
    """An error in one line of at most 300 characters, its beginning and its end: MLflow says the cause last."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"


@dataclass
class MetricRow:
    """Metrics of one step; without a step, the row takes the one after its metrics' last when it is written."""

    metrics: dict[str, float]
    step: int | None
    timestamp_ms: int = field(default_factory=now_ms)
    numbers_itself: bool = False

    def __str__(self) -> str:
        return f"metrics {', '.join(self.metrics)} of step {self.step}"


@dataclass(frozen=True, eq=False)
class Picture:
    """A uint8 (H, W, 3) image under a key and a step."""

    image: np.ndarray
    key: str
    step: int
    timestamp_ms: int = field(default_factory=now_ms)

    @property
    def place(self) -> tuple[str, int]:
        """Its key and step as they stand in the name of MLflow's file."""
        return self.key.replace("/", "~"), self.step

    def __str__(self) -> str:
        return f"picture {self.key} of step {self.step}"


@dataclass(frozen=True)
class StoredFile:
    """A file to copy to a folder of the run; it is read when its turn comes."""

    path: Path
    folder: str

    def __str__(self) -> str:
        return f"file {self.folder}/{self.path.name}"


@dataclass(frozen=True)
class StoredText:
    """A text to keep as a file of the run."""

    text: str
    file: str

    def __str__(self) -> str:
        return f"file {self.file}"


@dataclass(frozen=True)
class Status:
    """The run's status from a time on."""

    status: str
    timestamp_ms: int = field(default_factory=now_ms)

    def __str__(self) -> str:
        return f"status {self.status}"


Entry = MetricRow | Picture | StoredFile | StoredText | Status


def _described(entries: Iterable[Entry]) -> str:
    """Entries in words: rows of metrics by number and range of steps, all else by name."""
    rows = [entry for entry in entries if isinstance(entry, MetricRow)]
    steps = [row.step for row in rows if row.step is not None and not row.numbers_itself]
    pictures: dict[str, list[int]] = {}
    for entry in entries:
        if isinstance(entry, Picture):
            pictures.setdefault(entry.key, []).append(entry.step)
    parts = []
    if steps:
        parts.append(f"{len(steps)} metric rows (steps {min(steps)} to {max(steps)})")
    if len(rows) > len(steps):
        parts.append(f"{len(rows) - len(steps)} rows of system metrics")
    parts += [f"pictures {key} (steps {', '.join(map(str, at))})" for key, at in pictures.items()]
    parts += [str(entry) for entry in entries if not isinstance(entry, (MetricRow, Picture))]
    return "; ".join(parts)


@dataclass
class _Lane:
    """Entries that wait for one another and for nothing else."""

    waiting: deque[Entry] = field(default_factory=deque)
    writing: list[Entry] = field(default_factory=list)
    pause_seconds: float = 0.0  # 0 while all is well
    retry_at: float = 0.0

    @property
    def entries(self) -> list[Entry]:
        """All that is not written yet, in order."""
        return [*self.writing, *self.waiting]


class Outbox:
    """Writes what is put into it to one run, in its order, from a thread that lives while there is something to do."""

    first_pause_seconds = 1.0
    longest_pause_seconds = 60.0
    idle_seconds = 30.0

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._changed = threading.Condition()
        self._records, self._artifacts = _Lane(), _Lane()
        self._lanes = (self._records, self._artifacts)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._num_rows = self._num_pictures = 0
        self._lost: Counter[str] = Counter()
        self._caught_up = 0
        # The thread's own: what the run has already, asked of the server before the first write of a kind.
        self._last_steps: dict[str, int] | None = None
        self._places: set[tuple[str, int]] | None = None
        self._singly = 0

    # --- the caller's side

    def put(self, entry: Entry) -> None:
        """Queues an entry at the end of its lane."""
        with self._changed:
            lane = self._records if isinstance(entry, (MetricRow, Status)) else self._artifacts
            lane.waiting.append(entry)
            self._count(entry, +1)
            self._start()

    def put_first(self, rows: list[MetricRow]) -> None:
        """Queues rows before all others, in their order."""
        with self._changed:
            self._records.waiting.extendleft(reversed(rows))
            for row in rows:
                self._count(row, +1)
            self._start()

    def rows(self) -> list[MetricRow]:
        """The rows that are not written yet, in order."""
        with self._changed:
            return [entry for entry in self._records.entries if isinstance(entry, MetricRow)]

    def forget_status(self) -> None:
        """Takes a status that still waits out of the queue, because another one follows."""
        with self._changed:
            kept = [entry for entry in self._records.waiting if not isinstance(entry, Status)]
            self._records.waiting = deque(kept)

    def flush(self, patience_seconds: float) -> str:
        """Waits until all is written or patience ends; returns what is not written, in words."""
        with self._changed:
            for lane in self._lanes:  # whoever waits has it tried at once
                lane.retry_at = 0.0
                lane.pause_seconds = min(lane.pause_seconds, self.first_pause_seconds)
            self._start()
            self._changed.wait_for(lambda: not any(lane.entries for lane in self._lanes), timeout=patience_seconds)
            left = [entry for lane in self._lanes for entry in lane.entries]
            return "; ".join(filter(None, [_described(left), self._lost_in_words() if left else ""]))

    def close(self) -> None:
        """Has the thread end as soon as all is written."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None and any(lane.waiting for lane in self._lanes):
            try_requests_once()
            self._closing = False
            self._thread = threading.Thread(target=self._work, name="mlflow-outbox", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _count(self, entry: Entry, change: int) -> None:
        """Keeps count of what waits; at the limits the oldest goes."""
        if isinstance(entry, MetricRow):
            self._num_rows += change
            if self._num_rows > MAX_ROWS:
                self._lose(self._records, MetricRow)
        elif isinstance(entry, Picture):
            self._num_pictures += change
            if self._num_pictures > MAX_PICTURES:
                self._lose(self._artifacts, Picture)

    def _lose(self, lane: _Lane, kind: type[Entry]) -> None:
        oldest = next((entry for entry in lane.waiting if isinstance(entry, kind)), None)
        if oldest is None:  # all of them are being written
            return
        lane.waiting.remove(oldest)
        self._count(oldest, -1)
        name, limit = ("metric rows", MAX_ROWS) if kind is MetricRow else ("pictures", MAX_PICTURES)
        if not self._lost[name]:
            logger.warning("only %d %s can wait for MLflow; the oldest are lost, first: %s", limit, name, oldest)
        self._lost[name] += 1

    def _lost_in_words(self) -> str:
        return ", ".join(f"{count} {name} lost before" for name, count in self._lost.items())

    # --- the thread's side

    def _work(self) -> None:
        while (lane := self._next_lane()) is not None:
            try:
                self._write(lane.writing)
            except Exception as error:
                self._after_failure(lane, error)
            else:
                self._after_success(lane)

    def _next_lane(self) -> _Lane | None:
        """Waits for a lane with something to write now, and takes that out of it; None after an idle while."""
        with self._changed:
            while True:
                busy = [lane for lane in self._lanes if lane.waiting]
                ready = [lane for lane in busy if lane.retry_at <= time.monotonic()]
                if ready:
                    self._take(ready[0])
                    return ready[0]
                if busy:
                    self._changed.wait(max(0.0, min(lane.retry_at for lane in busy) - time.monotonic()))
                elif self._closing or not self._changed.wait(self.idle_seconds):
                    if any(lane.waiting for lane in self._lanes):
                        continue
                    self._thread = None
                    return None

    def _take(self, lane: _Lane) -> None:
        lane.writing = [lane.waiting.popleft()]
        first = lane.writing[0]
        if not isinstance(first, MetricRow):
            return
        if self._singly:
            self._singly -= 1
            return
        num_metrics = len(first.metrics)
        while lane.waiting and isinstance(lane.waiting[0], MetricRow):
            num_metrics += len(lane.waiting[0].metrics)
            if num_metrics > METRICS_PER_REQUEST:
                return
            lane.writing.append(lane.waiting.popleft())

    def _after_success(self, lane: _Lane) -> None:
        with self._changed:
            if lane.pause_seconds:
                self._caught_up += len(lane.writing)
            self._done(lane)

    def _after_failure(self, lane: _Lane, error: Exception) -> None:
        with self._changed:
            if may_pass(error):
                if not self._failing():
                    logger.warning("cannot write to MLflow run %s (%s); what is logged is kept, and tried again",
                                   self._run_id, brief(error))  # fmt: skip
                lane.waiting.extendleft(reversed(lane.writing))
                lane.pause_seconds = min(
                    max(2 * lane.pause_seconds, self.first_pause_seconds), self.longest_pause_seconds
                )
                lane.retry_at = time.monotonic() + lane.pause_seconds
                self._places = None  # it may have arrived, only its reply did not
                lane.writing = []
            elif len(lane.writing) > 1:  # one of them spoils the request; the others are good
                lane.waiting.extendleft(reversed(lane.writing))
                self._singly = len(lane.writing)
                lane.writing = []
            else:
                logger.warning("MLflow run %s goes without %s: %s", self._run_id, lane.writing[0], brief(error))
                self._done(lane)

    def _failing(self) -> bool:
        return any(lane.pause_seconds for lane in self._lanes)

    def _done(self, lane: _Lane) -> None:
        """What was being written needs no more care; an outage ends when nothing waits for it any more."""
        for entry in lane.writing:
            self._count(entry, -1)
        lane.writing = []
        if lane.pause_seconds and not lane.waiting:
            lane.pause_seconds = 0.0
            if not self._failing():
                lost = self._lost_in_words()
                logger.info("MLflow run %s caught up: %d entries%s", self._run_id, self._caught_up,
                            f"; {lost}" if lost else "")  # fmt: skip
                self._caught_up = 0
        self._changed.notify_all()

    def _write(self, entries: list[Entry]) -> None:
        match entries[0]:
            case MetricRow():
                self._write_rows([entry for entry in entries if isinstance(entry, MetricRow)])
            case Status(status="RUNNING"):
                self._client.update_run(self._run_id, status="RUNNING")
            case Status() as ended:
                self._client.set_terminated(self._run_id, ended.status, end_time=ended.timestamp_ms)
            case Picture() as picture:
                self._write_picture(picture)
            case StoredFile() as file:
                self._client.log_artifact(self._run_id, str(file.path), file.folder)
            case StoredText() as stored:
                self._client.log_text(self._run_id, stored.text, stored.file)

    def _write_rows(self, rows: list[MetricRow]) -> None:
        """Writes rows in one request, which MLflow stores whole or not at all; leaves out steps that the run has.

        A request whose reply was lost is sent again: MLflow keeps one of two metrics that are equal in key, step, value
        and time.
        """
        if self._last_steps is None:
            # Not by get_metric_history: that is every point of a long training. A run's data has each key's last step.
            data = self._client.get_run(self._run_id).data.to_proto()
            self._last_steps = {metric.key: metric.step for metric in data.metrics}
        reached, metrics, num_skipped = dict(self._last_steps), [], 0
        for row in rows:
            if row.step is None:
                row.step = 1 + max(reached.get(key, -1) for key in row.metrics)
            fresh = {key: value for key, value in row.metrics.items() if _is_new(key, row.step, reached)}
            num_skipped += not fresh
            for key, value in fresh.items():
                metrics.append(Metric(key, value, row.timestamp_ms, row.step))
                reached[key] = row.step
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)
        self._last_steps = reached
        if num_skipped:
            logger.debug("MLflow run %s has the steps of %d metric rows already", self._run_id, num_skipped)

    def _write_picture(self, picture: Picture) -> None:
        if self._places is None:
            self._places = set(_places(file.path for file in self._client.list_artifacts(self._run_id, "images")))
        if picture.place not in self._places:
            self._client.log_image(
                self._run_id, Image.fromarray(picture.image), key=picture.key, step=picture.step,
                timestamp=picture.timestamp_ms,
            )  # fmt: skip
            self._places.add(picture.place)


def _is_new(key: str, step: int, last_steps: Mapping[str, int]) -> bool:
    return key.split("/")[0] in REPEATABLE_FAMILIES or step > last_steps.get(key, step - 1)


def _places(paths: Iterable[str]) -> Iterable[tuple[str, int]]:
    """(key, step) of MLflow's image files: images/KEY+step+STEP+timestamp+TIME+ID+compressed.webp, written last."""
    for path in paths:
        key, separator, rest = path.removeprefix("images/").partition("+step+")
        if separator and path.endswith("+compressed.webp"):
            yield key, int(rest.split("+")[0])


def row_as_json(row: MetricRow) -> dict[str, Any]:
    """A row as JSON has it."""
    return {"step": row.step, "timestamp_ms": row.timestamp_ms, "metrics": dict(row.metrics)}


def row_from_json(content: Mapping[str, Any]) -> MetricRow:
    """The row that `row_as_json` was given."""
    return MetricRow(dict(content["metrics"]), int(content["step"]), int(content["timestamp_ms"]))
