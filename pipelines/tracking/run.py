"""Logs a training run to MLflow in the background."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from PIL import Image

from pipelines.errors import InputError
from pipelines.tracking.outbox import MetricRow, Outbox, Request, now_ms
from pipelines.tracking.server import disable_http_retries, explain_failure, is_retryable, one_line
from pipelines.tracking.system_metrics import SystemMetrics

logger = logging.getLogger(__name__)


class Run:
    """An MLflow run. Any process can resume it by its id.

    Log calls only add to a queue. A background thread writes to the server and retries while the process is alive, so
    training neither waits for the tracking server nor fails with it. Each key is logged at most once per step, because
    a resumed training run may repeat its last steps.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self.client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self._outbox = Outbox(self.client, run_id)

    @classmethod
    def begin(
        cls,
        tracking_uri: str,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str] = MappingProxyType({}),
        datasets: Sequence[DatasetInput] = (),
        parent_run_id: str | None = None,
    ) -> "Run":
        """Creates a run with its parameters, tags and datasets. MLflow shows it below its parent, if it has one.

        Raises InputError if MLflow cannot be reached or refuses the run.
        """
        disable_http_retries()
        client = MlflowClient(tracking_uri)
        tags = dict(tags) if parent_run_id is None else {**tags, MLFLOW_PARENT_RUN_ID: parent_run_id}
        try:
            run_id = client.create_run(_experiment_id(client, experiment), run_name=name, tags=tags).info.run_id
            try:
                client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
                if datasets:
                    client.log_inputs(run_id, datasets=list(datasets))
            except MlflowException:
                with contextlib.suppress(MlflowException):
                    client.set_terminated(run_id, "FAILED")
                raise
        except MlflowException as error:
            if is_retryable(error):
                raise InputError(explain_failure(tracking_uri, error)) from error
            raise InputError(f"MLflow at {tracking_uri} refuses the run {name}: {one_line(error)}") from error
        return cls(tracking_uri, run_id)

    def resume(self) -> None:
        """Sets the run's status to RUNNING. If MLflow cannot be reached, the change is queued.

        Raises InputError if the run does not exist on the tracking server.
        """
        disable_http_retries()
        try:
            self.client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            if not is_retryable(error):
                raise InputError(
                    f"{self.tracking_uri} has no MLflow run {self.run_id}, to which this training run was logged; "
                    f"set MLFLOW_TRACKING_URI to the server that has it"
                ) from error
            logger.warning("continuing without MLflow at %s for now (%s)", self.tracking_uri, one_line(error))
            self._put_status("RUNNING", partial(self.client.update_run, self.run_id, status="RUNNING"))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues metrics of a step. Skips keys that were already logged for this or a later step.

        Keys that begin with "evaluate/" are never skipped: their step is the number of sampling steps, which repeats
        in every evaluation.
        """
        self._outbox.put(MetricRow({key: float(value) for key, value in metrics.items()}, step))

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Queues a uint8 (H, W, 3) image. Skips it if the run already has an image with this key and step."""
        upload = partial(self._upload_image, image.copy(), key, step, now_ms())
        self._outbox.put(Request(f"image {key} of step {step}", upload, num_bytes=image.nbytes))

    def log_file(self, path: Path, folder: str) -> None:
        """Queues a file for upload to a folder of the run's artifacts. Call `flush` before you delete the file."""
        upload = partial(self.client.log_artifact, self.run_id, str(path), folder)
        self._outbox.put(Request(f"file {folder}/{path.name}", upload))

    def log_dict(self, content: Mapping[str, Any], file: str) -> None:
        """Queues a dictionary for upload as a JSON artifact."""
        self.log_text(json.dumps(content, indent=2) + "\n", file)

    def log_text(self, text: str, file: str) -> None:
        """Queues a text for upload as an artifact."""
        self._outbox.put(Request(f"file {file}", partial(self.client.log_text, self.run_id, text, file)))

    def pending(self) -> list[dict[str, Any]]:
        """The unwritten metrics, in order and as JSON values, for a checkpoint. Excludes system metrics."""
        return [row.to_json() for row in self._outbox.rows() if row.step is not None]

    def adopt(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Queues the metrics that `pending` returned in another process.

        Call this before logging, because a step is skipped once a later one is logged.
        """
        for row in rows:
            self._outbox.put(MetricRow.from_json(row))

    def flush(self, patience_seconds: float = 60.0) -> bool:
        """Waits until the queue is written. Logs a warning and returns False after `patience_seconds`."""
        return self._outbox.flush(patience_seconds)

    def end(self, status: str, patience_seconds: float = 60.0) -> None:
        """Writes the queue and sets the run's final status: FINISHED, FAILED or KILLED.

        If the server cannot be reached, logs a warning. The status is then set once the server is back, provided that
        the process is still alive.
        """
        self._put_status(status, partial(self.client.set_terminated, self.run_id, status, end_time=now_ms()))
        self.flush(patience_seconds)

    @contextlib.contextmanager
    def ends(self) -> Iterator[None]:
        """Ends the run with the block: FINISHED, KILLED after a stop or an interrupt, FAILED after any other exception."""
        try:
            yield
        except BaseException as error:
            self.end("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
            raise
        self.end("FINISHED")

    def system_metrics(self, node_id: str) -> SystemMetrics:
        """A context manager that logs this machine's CPU, memory, disk, network and GPU usage. Call `flush` after it."""
        return SystemMetrics(self._outbox, self.run_id, self.tracking_uri, node_id)

    def _put_status(self, status: str, request: partial) -> None:
        self._outbox.put(Request(f"status {status}", request, is_ordered=True))

    def _upload_image(self, image: np.ndarray, key: str, step: int, timestamp_ms: int) -> None:
        # MLflow names the files images/KEY+step+STEP+timestamp+...; it writes the .webp last.
        prefix = f"images/{key.replace('/', '~')}+step+{step}+"
        paths = [file.path for file in self.client.list_artifacts(self.run_id, "images")]
        if not any(path.startswith(prefix) and path.endswith("+compressed.webp") for path in paths):
            self.client.log_image(self.run_id, Image.fromarray(image), key=key, step=step, timestamp=timestamp_ms)


def _experiment_id(client: MlflowClient, name: str) -> str:
    """The id of an experiment. Creates it if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    artifacts = None  # the server chooses the location
    if client.tracking_uri.startswith("sqlite:///"):
        database = Path(client.tracking_uri.removeprefix("sqlite:///")).absolute()
        artifacts = (database.parent / "mlflow-artifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=artifacts))
