"""Where a generator comes from: a folder, or MLflow. Deploy's only MLflow import."""

from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from meanflow_core.generator import find_generator

REGISTRY_SCHEMES = ("models:/", "runs:/")


def is_registered(model: str) -> bool:
    """True for a model that lies in MLflow."""
    return model.startswith(REGISTRY_SCHEMES)


def fetch_generator(model: str, tracking_uri: str | None) -> Path:
    """The local folder of a generator: of a folder, "models:/name@alias", or "runs:/id/name".

    Raises ValueError where there is none, saying what was wanted.
    """
    if not is_registered(model):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"model {model} is no folder; wanted a generator's folder, models:/name@alias or runs:/id/name"
            )
        return find_generator(folder)
    if not tracking_uri:
        raise ValueError(f"model {model} lies in MLflow; give tracking_uri, or set MLFLOW_TRACKING_URI")
    # For the whole process: MLflow 3.17 looks names up at the global address, whatever registry_uri it is handed.
    mlflow.set_tracking_uri(tracking_uri)
    try:
        return find_generator(Path(mlflow.artifacts.download_artifacts(model)))
    except (MlflowException, OSError) as error:
        raise ValueError(f"cannot fetch {model} from {tracking_uri}: {error}") from error
