"""MLflow for the pipelines: where it is, one run per training, and the registry of generators."""

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LoggedModelOutput, Param
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from pipelines import storage
from pipelines.errors import InputError
from pipelines.tracking.outbox import (
    MetricRow,
    Outbox,
    Picture,
    Status,
    StoredFile,
    StoredText,
    brief,
    may_pass,
    row_as_json,
    row_from_json,
    try_requests_once,
)
from pipelines.tracking.system_metrics import SystemMetrics

T = TypeVar("T")

logger = logging.getLogger(__name__)

ALIAS = "champion"
MODEL_FILE = Path(__file__).with_name("mlflow_generator.py")
# In a training's folder: what it is, and which MLflow run at which address tracks it.
TRAINING_RECORD = "training.json"
# Tag of a model's version: the hash of its network's weights, which an endpoint and a report state too.
WEIGHTS_TAG = "transformer_sha256"


def resolve_tracking_uri(storage_location: str, num_nodes: int) -> str:
    """MLFLOW_TRACKING_URI where set; else a database in the local storage folder, by its absolute path.

    Absolute, because a cluster job runs in a temporary copy of its working directory, and MLflow's relative default
    would be lost with it. Raises InputError where several machines would have to share one file.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    if not storage.is_local(storage_location) or num_nodes > 1:
        raise InputError(
            f"tracking needs an MLflow server: storage {storage_location} on {num_nodes} node(s) leaves no place for a "
            f"local database; set MLFLOW_TRACKING_URI, for example to http://mlflow.example:5000"
        )
    folder = Path(storage.absolute(storage_location))
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db"


def _experiment_id(client: MlflowClient, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return str(found.experiment_id)
    artifacts = None  # a server knows its own place
    if client.tracking_uri.startswith("sqlite:///"):
        database = Path(client.tracking_uri.removeprefix("sqlite:///")).absolute()
        artifacts = (database.parent / "mlflow-artifacts").as_uri()
    return str(client.create_experiment(experiment, artifact_location=artifacts))


class Run:
    """One MLflow run, by its id: it can be continued from any process.

    What is logged is queued and written by a thread, for as long as the server takes to answer: no caller waits, and no
    training ends, because of it. A step that the run has already is left out, key by key, so that a training which was
    killed may log its last steps again.
    """

    patience_to_register_seconds = 300.0

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self._client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self._outbox = Outbox(self._client, run_id)

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
        """A new run with its parameters, tags and data sets.

        Raises InputError where MLflow cannot be reached or refuses them.
        """
        try_requests_once()
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
            if may_pass(error):
                raise InputError(_unreachable(tracking_uri, error)) from error
            raise InputError(f"MLflow at {tracking_uri} refuses the run {name}: {brief(error)}") from error
        return cls(tracking_uri, run_id)

    def resume(self) -> None:
        """Marks the run as running again: later, where MLflow cannot be reached now, since a training need not wait.

        Raises InputError where the tracking address does not know it.
        """
        try_requests_once()
        try:
            self._client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            if not may_pass(error):
                raise InputError(
                    f"{self.tracking_uri} does not know MLflow run {self.run_id}, which this training began; "
                    f"set MLFLOW_TRACKING_URI to where it was"
                ) from error
            logger.warning("going on without MLflow at %s, to be told later (%s)", self.tracking_uri, brief(error))
            self._outbox.put(Status("RUNNING"))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues metrics of a step. Those that have this step or a later one already are left out.

        The family "evaluate/" is not: its step is the number of sampling steps, which a later evaluation has again.
        """
        self._outbox.put(MetricRow({name: float(value) for name, value in metrics.items()}, step))

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Queues uint8 (H, W, 3) under a key and a step; left out where the run has a picture there."""
        self._outbox.put(Picture(image.copy(), key, step))

    def log_file(self, path: Path, folder: str) -> None:
        """Queues a copy of a file to the run's artifacts; it is read when its turn comes, so flush before it goes."""
        self._outbox.put(StoredFile(path, folder))

    def log_dict(self, content: Mapping[str, Any], file: str) -> None:
        """Queues a JSON file among the run's artifacts."""
        self._outbox.put(StoredText(json.dumps(content, indent=2) + "\n", file))

    def pending(self) -> list[dict[str, Any]]:
        """The metrics that wait to be written, for a checkpoint: JSON, in order. System metrics are not among them."""
        return [row_as_json(row) for row in self._outbox.rows() if not row.numbers_itself]

    def adopt(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Queues what `pending` gave another process, in the order of steps and before what is queued already.

        To be called before anything is logged: a step that is written already leaves those before it out.
        """
        self._outbox.put_first(sorted((row_from_json(row) for row in rows), key=lambda row: row.step or 0))

    def flush(self, patience_seconds: float = 60.0) -> bool:
        """Waits until all that was queued is written, or patience ends: then False, and a warning says what is not."""
        missing = self._outbox.flush(patience_seconds)
        if missing:
            logger.warning("not logged to MLflow run %s at %s after %g s: %s",
                           self.run_id, self.tracking_uri, patience_seconds, missing)  # fmt: skip
        return not missing

    def end(self, status: str, patience_seconds: float = 60.0) -> None:
        """Writes what is queued, then ends the run as FINISHED, FAILED or KILLED.

        A server that cannot be reached is a warning; the run then ends if it comes back while the process lives.
        """
        self._outbox.forget_status()
        self._outbox.put(Status(status))
        self.flush(patience_seconds)
        self._outbox.close()

    def system_metrics(self, node_id: str) -> "SystemMetrics":
        """A context in which the use of this machine's processors, memory, disks, network and GPUs is logged.

        The last samples are written by a flush.
        """
        return SystemMetrics(self._outbox, self.run_id, self.tracking_uri, node_id)

    def register_generator(self, folder: Path, name: str, tags: Mapping[str, str] = MappingProxyType({})) -> str:
        """Registers a generator folder as the model's next version, gives it the alias, and returns its URI.

        tags: of the version; WEIGHTS_TAG among them lets `tag_generator` find it. The run's status stays as it is.
        Raises InputError where MLflow cannot be reached for five minutes.
        """
        # For the whole process: a database's registry looks the model up at the global address.
        mlflow.set_tracking_uri(self.tracking_uri)
        # Not pyfunc.log_model: it starts the run again, reads the whole history of every metric, and writes the points of
        # step 0 a second time.
        run = self._insist(lambda: self._client.get_run(self.run_id))
        logged = self._insist(
            lambda: self._client.create_logged_model(run.info.experiment_id, name=name, source_run_id=self.run_id)
        )
        model = Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=self.run_id,
        )
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "model"
            mlflow.pyfunc.save_model(
                path=str(local),
                mlflow_model=model,
                python_model=str(MODEL_FILE),
                artifacts={"generator": str(folder)},
                signature=ModelSignature(
                    inputs=Schema([ColSpec("long", "class_label"), ColSpec("long", "seed")]),
                    outputs=Schema([ColSpec("binary", "image_png")]),
                    params=ParamSchema([ParamSpec("num_inference_steps", "long", 1)]),
                ),
                input_example=pd.DataFrame({"class_label": [0], "seed": [0]}),
                pip_requirements=["torch", "diffusers", "safetensors", "meanflow-ray"],
            )
            self._insist(lambda: self._client.log_model_artifacts(logged.model_id, str(local)))
        self._insist(lambda: self._client.finalize_logged_model(logged.model_id, "READY"))
        self._insist(lambda: self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)]))
        try:
            self._insist(lambda: self._client.create_registered_model(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._insist(
            lambda: self._client.create_model_version(
                name, logged.model_uri, run_id=self.run_id, model_id=logged.model_id, tags=dict(tags)
            )
        )
        self._insist(lambda: self._client.set_registered_model_alias(name, ALIAS, str(version.version)))
        return f"models:/{name}@{ALIAS}"

    def tag_generator(self, transformer_sha256: str, family: str, tags: Mapping[str, str]) -> None:
        """Tags the registered versions of this run whose network has these weights; a warning where MLflow is away.

        Their other tags whose names begin with `family` go: what is said there is of one moment.
        """
        try_requests_once()
        try:
            versions = self._client.search_model_versions(f"run_id = '{self.run_id}'")
            same = [version for version in versions if version.tags.get(WEIGHTS_TAG) == transformer_sha256]
            if not same:
                logger.info("no registered version of run %s has these weights, so none is tagged", self.run_id)
            for version in same:
                for key in version.tags:
                    if key.startswith(family) and key not in tags:
                        self._client.delete_model_version_tag(version.name, version.version, key)
                for key, value in tags.items():
                    self._client.set_model_version_tag(version.name, version.version, key, value)
        except MlflowException as error:
            logger.warning("the model's versions of run %s have no tags of this: %s", self.run_id, brief(error))

    def _insist(self, request: Callable[[], T]) -> T:
        """A request's result, tried again for five minutes."""
        deadline, has_warned = time.monotonic() + self.patience_to_register_seconds, False
        while True:
            try:
                return request()
            except Exception as error:
                if not may_pass(error):
                    raise
                if time.monotonic() > deadline:
                    raise InputError(_unreachable(self.tracking_uri, error)) from error
                if not has_warned:
                    logger.warning("MLflow at %s does not register for now: %s", self.tracking_uri, brief(error))
                has_warned = True
            time.sleep(1.0)


def _unreachable(tracking_uri: str, error: Exception) -> str:
    """What to do about a request that may succeed later, or for somebody else."""
    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if status == 401:
        said = f"MLflow at {tracking_uri} does not know who asks; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    elif status == 403:
        said = (
            f"MLflow at {tracking_uri} refuses this host name or this user; name the host in the server's --allowed-hosts, "
            f"or give the user the permission"
        )
    else:
        said = f"cannot reach MLflow at {tracking_uri}; start it, or set MLFLOW_TRACKING_URI"
    return f"{said} ({brief(error)})"
