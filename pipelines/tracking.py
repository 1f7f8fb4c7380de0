"""MLflow for the pipelines: where it is, one run per training, and the registry of generators."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

from meanflow_core.generator import find_generator
from pipelines import storage
from pipelines.command import InputError

logger = logging.getLogger(__name__)

ALIAS = "champion"
MODEL_FILE = Path(__file__).with_name("mlflow_generator.py")
REGISTRY_SCHEMES = ("models:/", "runs:/")
# In a training's folder: what it is, and which MLflow run at which address tracks it.
TRAINING_RECORD = "training.json"


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
    """One MLflow run, by its id: it can be continued from any process."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self._client = MlflowClient(tracking_uri)
        self._queued: list[Any] = []

    @classmethod
    def begin(cls, tracking_uri: str, experiment: str, name: str, parameters: Mapping[str, Any]) -> "Run":
        """A new run with its parameters."""
        client = MlflowClient(tracking_uri)
        experiment_id = _experiment_id(client, experiment)
        created = client.create_run(experiment_id, run_name=name)
        client.log_batch(created.info.run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
        return cls(tracking_uri, created.info.run_id)

    def resume(self) -> None:
        """Marks the run as running again. Raises InputError where the tracking address does not know it."""
        try:
            self._client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            raise InputError(
                f"{self.tracking_uri} does not know MLflow run {self.run_id}, which this training began; "
                f"set MLFLOW_TRACKING_URI to where it was"
            ) from error

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues metrics of a step; the caller does not wait."""
        now = mlflow.utils.time.get_current_time_millis()
        batch = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._queued.append(self._client.log_batch(self.run_id, metrics=batch, synchronous=False))

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Logs uint8 (H, W, 3) under a key and a step."""
        self._client.log_image(self.run_id, Image.fromarray(image), key=key, step=step)

    def log_file(self, path: Path, folder: str) -> None:
        """Copies a file to the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def flush(self) -> None:
        """Waits until what was queued is written."""
        # Operation by operation: mlflow.flush_async_logging() flushes another address's queue, making a database for it.
        for operation in self._queued:
            operation.wait()
        self._queued.clear()

    def end(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self.flush()
        self._client.set_terminated(self.run_id, status)

    def register_generator(self, folder: Path, name: str) -> str:
        """Registers a generator folder as the model's next version, gives it the alias, and returns its URI."""
        mlflow.set_tracking_uri(self.tracking_uri)
        signature = ModelSignature(
            inputs=Schema([ColSpec("long", "class_label"), ColSpec("long", "seed")]),
            outputs=Schema([ColSpec("binary", "image_png")]),
            params=ParamSchema([ParamSpec("num_inference_steps", "long", 1)]),
        )
        status = self._client.get_run(self.run_id).info.status
        with mlflow.start_run(run_id=self.run_id):
            info = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(MODEL_FILE),
                artifacts={"generator": str(folder)},
                registered_model_name=name,
                signature=signature,
                pip_requirements=["torch", "diffusers", "safetensors", "meanflow-ray"],
            )
        self._client.update_run(self.run_id, status=status)
        version = info.registered_model_version
        self._client.set_registered_model_alias(name, ALIAS, str(version))
        return f"models:/{name}@{ALIAS}"


def find_run(model: str, tracking_uri: str | None) -> Run | None:
    """The run that trained a model: a registered one's, or that of a generator which still lies in its run's folder.

    None where nothing says so.
    """
    if not model.startswith(REGISTRY_SCHEMES):
        record = Path(model).expanduser().absolute().parent / TRAINING_RECORD
        if not record.is_file():
            return None
        content = json.loads(record.read_text())
        # Its own address, unless another is named: a run's id means nothing elsewhere.
        return Run(tracking_uri or content["tracking_uri"], content["mlflow_run_id"])
    if tracking_uri is None:
        return None
    if model.startswith("runs:/"):
        return Run(tracking_uri, model.removeprefix("runs:/").split("/")[0])
    client, name = MlflowClient(tracking_uri), model.removeprefix("models:/")
    try:
        if "@" in name:
            found = client.get_model_version_by_alias(*name.split("@", 1))
        else:
            found = client.get_model_version(*name.split("/", 1))
    except (MlflowException, TypeError):
        return None
    return Run(tracking_uri, found.run_id) if found.run_id else None


def fetch_generator(model: str, tracking_uri: str | None) -> Path:
    """A generator's local folder: of a folder, or of "models:/name@alias" or "runs:/id/name" through MLflow.

    Raises InputError where there is none.
    """
    if not model.startswith(REGISTRY_SCHEMES):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"model {model} is no folder; wanted a generator's folder, models:/name@alias or runs:/id/name"
            )
    else:
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not tracking_uri:
            raise InputError(f"model {model} lies in MLflow; give --tracking-uri, or set MLFLOW_TRACKING_URI")
        # For the whole process: MLflow 3.17 looks names up at the global address, whatever registry_uri it is handed.
        mlflow.set_tracking_uri(tracking_uri)
        try:
            folder = Path(mlflow.artifacts.download_artifacts(model))
        except (MlflowException, OSError) as error:
            raise InputError(f"cannot fetch {model} from {tracking_uri}: {error}") from error
    try:
        return find_generator(folder)
    except ValueError as error:
        raise InputError(str(error)) from error
