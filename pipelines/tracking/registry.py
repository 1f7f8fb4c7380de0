"""MLflow's model registry: finding and fetching generators."""

import json
import os
from pathlib import Path
from typing import TypeVar

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from meanflow_core.generator import find_generator
from pipelines.errors import InputError
from pipelines.tracking.run import TRAINING_RECORD, Run

T = TypeVar("T")

REGISTRY_SCHEMES = ("models:/", "runs:/")


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
