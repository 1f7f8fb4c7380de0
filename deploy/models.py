"""Where a generator comes from: a folder, or MLflow. Deploy's only MLflow import."""

from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from meanflow_core.pipeline import find_generator

REGISTRY_SCHEMES = ("models:/", "runs:/")


def fetch_generator(model: str, tracking_uri: str | None) -> Path:
    """The local folder of a generator: of a folder, "models:/name@alias", or "runs:/id/name".

    Raises ValueError where there is none, saying what was wanted.
    """
    if not model.startswith(REGISTRY_SCHEMES):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"model {model} is no folder; wanted a generator's folder, models:/name@alias or runs:/id/name"
            )
        return find_generator(folder)
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)  # the registry follows it
    try:
        return find_generator(Path(mlflow.artifacts.download_artifacts(artifact_uri=model)))
    except (MlflowException, OSError) as error:
        raise ValueError(f"cannot fetch {model} from {tracking_uri or mlflow.get_tracking_uri()}: {error}") from error
