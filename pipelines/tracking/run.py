"""One MLflow run per training, written in the background."""

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Param
from mlflow.exceptions import MlflowException
from PIL import Image

from pipelines.errors import InputError
from pipelines.tracking.outbox import MetricRow, Outbox, Request, now_ms
from pipelines.tracking.server import disable_http_retries, explain_failure, is_retryable, one_line
from pipelines.tracking.system_metrics import SystemMetrics

logger = logging.getLogger(__name__)


class Run:
    """One MLflow run. Any process can continue it by its id.

    Log calls only queue; a background thread writes to the server and retries for as long as the process lives. A
    training therefore neither waits for its tracking server nor fails with it. Each key is logged once per step: a
    resumed training may log its last steps again.
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
    ) -> "Run":
        """Creates a run with its parameters, tags and datasets.

        Raises InputError if MLflow cannot be reached or refuses them.
        """
        disable_http_retries()
        client = MlflowClient(tracking_uri)
        try:
            run_id = client.create_run(_experiment_id(client, experiment), run_name=name, tags=dict(tags)).info.run_id
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
        """Sets the run's status to RUNNING; queues the change if MLflow cannot be reached now.

        Raises InputError if the tracking server does not know the run.
        """
        disable_http_retries()
        try:
            self.client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            if not is_retryable(error):
                raise InputError(
                    f"{self.tracking_uri} does not know MLflow run {self.run_id}, which this training created; "
                    f"set MLFLOW_TRACKING_URI to the server that has it"
                ) from error
            logger.warning("continuing without MLflow at %s for now (%s)", self.tracking_uri, one_line(error))
            self._put_status("RUNNING", partial(self.client.update_run, self.run_id, status="RUNNING"))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues metrics of a step. A key that already has this step or a later one is skipped.

        Keys that begin with "evaluate/" are never skipped. Their step is the number of sampling steps, which every
        evaluation repeats.
        """
        self._outbox.put(MetricRow({key: float(value) for key, value in metrics.items()}, step))

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Queues a uint8 (H, W, 3) image; skipped if the run already has one of this key and step."""
        upload = partial(self._upload_image, image.copy(), key, step, now_ms())
        self._outbox.put(Request(f"image {key} of step {step}", upload, num_bytes=image.nbytes))

    def log_file(self, path: Path, folder: str) -> None:
        """Queues a file for a folder of the run's artifacts. It is read later: call `flush` before deleting it."""
        upload = partial(self.client.log_artifact, self.run_id, str(path), folder)
        self._outbox.put(Request(f"file {folder}/{path.name}", upload))

    def log_dict(self, content: Mapping[str, Any], file: str) -> None:
        """Queues a JSON file for the run's artifacts."""
        text = json.dumps(content, indent=2) + "\n"
        self._outbox.put(Request(f"file {file}", partial(self.client.log_text, self.run_id, text, file)))

    def pending(self) -> list[dict[str, Any]]:
        """The metrics not written yet, in order and as JSON values, to store in a checkpoint. Excludes system metrics."""
        return [row.to_json() for row in self._outbox.rows() if row.step is not None]

    def adopt(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Queues what another process returned from `pending`. Call it before logging: an older step is skipped."""
        for row in rows:
            self._outbox.put(MetricRow.from_json(row))

    def flush(self, patience_seconds: float = 60.0) -> bool:
        """Waits until the queue is written. After `patience_seconds` it warns and returns False."""
        return self._outbox.flush(patience_seconds)

    def end(self, status: str, patience_seconds: float = 60.0) -> None:
        """Writes the queue and ends the run as FINISHED, FAILED or KILLED.

        Only warns if the server cannot be reached. The run then ends once it is back, if the process still lives.
        """
        self._put_status(status, partial(self.client.set_terminated, self.run_id, status, end_time=now_ms()))
        self.flush(patience_seconds)

    def system_metrics(self, node_id: str) -> SystemMetrics:
        """A context that logs this machine's use of CPU, memory, disks, network and GPUs. Call `flush` after it."""
        return SystemMetrics(self._outbox, self.run_id, self.tracking_uri, node_id)

    def _put_status(self, status: str, request: partial) -> None:
        self._outbox.put(Request(f"status {status}", request, keeps_its_place=True))

    def _upload_image(self, image: np.ndarray, key: str, step: int, timestamp_ms: int) -> None:
        # MLflow names the files images/KEY+step+STEP+timestamp+...; it writes the .webp last.
        prefix = f"images/{key.replace('/', '~')}+step+{step}+"
        paths = [file.path for file in self.client.list_artifacts(self.run_id, "images")]
        if not any(path.startswith(prefix) and path.endswith("+compressed.webp") for path in paths):
            self.client.log_image(self.run_id, Image.fromarray(image), key=key, step=step, timestamp=timestamp_ms)


def _experiment_id(client: MlflowClient, name: str) -> str:
    """The id of an experiment, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    artifacts = None  # a server chooses its own location
    if client.tracking_uri.startswith("sqlite:///"):
        database = Path(client.tracking_uri.removeprefix("sqlite:///")).absolute()
        artifacts = (database.parent / "mlflow-artifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=artifacts))
