"""Where a generator comes from: a folder, or MLflow. Deploy's only MLflow import.

    python -m deploy.models models:/meanflow-xl2@champion      # prints what the alias stands for now: models:/meanflow-xl2/3

An alias may point elsewhere a moment later, and replicas start at different times; so an alias is resolved once, and
replicas are told a version.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from deploy.messages import ModelSource
from meanflow_core.generator import find_generator

REGISTRY_SCHEMES = ("models:/", "runs:/")
# Unreachable servers and refused names, as MLflow reports them.
FETCH_ERRORS = (MlflowException, OSError)


def is_registered(model: str) -> bool:
    """True for a model that lies in MLflow."""
    return model.startswith(REGISTRY_SCHEMES)


def is_alias(model: str) -> bool:
    """True for a name that may stand for another version tomorrow."""
    return model.startswith("models:/") and ("@" in model or model.endswith("/latest"))


def _client(model: str, tracking_uri: str | None) -> MlflowClient:
    if not tracking_uri:
        raise ValueError(f"model {model} lies in MLflow; give tracking_uri, or set MLFLOW_TRACKING_URI")
    # For the whole process: MLflow 3.17 looks names up at the global address, whatever registry_uri it is handed.
    mlflow.set_tracking_uri(tracking_uri)
    return MlflowClient(tracking_uri)


def resolve_model(model: str, tracking_uri: str | None) -> str:
    """The model without aliases: "models:/name@alias" and "models:/name/latest" -> "models:/name/3"; folders absolute.

    Raises ValueError where there is no such model.
    """
    if not is_registered(model):
        folder = Path(model).expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(
                f"model {model} is no folder; wanted a generator's folder, models:/name@alias or runs:/id/name"
            )
        find_generator(folder)
        return str(folder)
    client = _client(model, tracking_uri)
    try:
        if is_alias(model):
            name, _, alias = model.removeprefix("models:/").replace("/latest", "@latest").partition("@")
            return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"
        if not mlflow.artifacts.list_artifacts(artifact_uri=model):
            raise ValueError(f"{model} at {tracking_uri} has no files")
    except FETCH_ERRORS as error:
        raise ValueError(f"cannot find {model} at {tracking_uri}: {error}") from error
    return model


def _source(model: str, tracking_uri: str | None) -> ModelSource:
    if not is_registered(model):
        folder = Path(model)
        # A run's own folder calls it "generator"; the run's name says more.
        name = folder.parent.name if folder.name == "generator" else folder.name
        return ModelSource(model=model, name=name, run_id=_run_of_folder(folder))
    version = re.fullmatch(r"models:/([^/@]+)/(\d+)", model)
    if version:
        found = _client(model, tracking_uri).get_model_version(version[1], version[2])
        return ModelSource(
            model=model, name=version[1], version=version[2], run_id=found.run_id, tracking_uri=tracking_uri
        )
    run = re.match(r"runs:/([^/]+)/(.+)", model)
    return ModelSource(
        model=model, name=model.rpartition("/")[2], run_id=run[1] if run else None, tracking_uri=tracking_uri
    )


def announce(source: ModelSource, served_as: str) -> None:
    """Tells MLflow that a registered version serves, as its tag endpoint.NAME: the moment, in UTC.

    Raises what MLflow says where it does not take it. Folders and runs' files are no versions: nothing is told.
    """
    if source.version is None:
        return
    name = re.sub(r"[^\w.\- :]", "-", served_as)  # what MLflow takes in a tag's name
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    client = _client(source.model, source.tracking_uri)
    client.set_model_version_tag(source.name, source.version, f"endpoint.{name}", moment)


def _tags(source: ModelSource) -> dict[str, str]:
    """Of a registered version: what it was trained on, how it was measured, where it serves."""
    if source.version is None:
        return {}
    return dict(_client(source.model, source.tracking_uri).get_model_version(source.name, source.version).tags)


def _run_of_folder(folder: Path) -> str | None:
    """The MLflow run whose folder a generator still lies in."""
    try:
        return str(json.loads((folder.parent / "training.json").read_text())["mlflow_run_id"])
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def fetched_generator(model: str, tracking_uri: str | None) -> Iterator[tuple[Path, ModelSource]]:
    """A generator's local folder, and where it came from. What was downloaded is deleted in the end.

    model: a folder, "models:/name/3", or "runs:/id/name"; aliases go through `resolve_model` first.
    Raises ValueError where there is none, or it cannot be fetched.
    """
    if not is_registered(model):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ValueError(f"model {model} is no folder on this machine; wanted a generator's folder")
        found = find_generator(folder)
        yield found, _source(str(found), None)
        return
    if is_alias(model):
        raise ValueError(f"{model} may stand for another version on each replica; name the one that is wanted")
    _client(model, tracking_uri)
    with tempfile.TemporaryDirectory(prefix="generator-") as folder_name:
        try:
            source = _source(model, tracking_uri)
            found = find_generator(Path(mlflow.artifacts.download_artifacts(model, dst_path=folder_name)))
        except FETCH_ERRORS as error:
            raise ValueError(f"cannot fetch {model} from {tracking_uri}: {error}") from error
        yield found, source


def main() -> None:
    """The command: prints a model without aliases, where it came from, and what became of it."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder, models:/name@alias, models:/name/version or runs:/id/name")
    parser.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"))
    parser.add_argument("--json", action="store_true", help="everything that is known of it")
    arguments = parser.parse_args()
    try:
        resolved = resolve_model(arguments.model, arguments.tracking_uri)
        source = _source(resolved, arguments.tracking_uri) if arguments.json else None
        about = source and {**source.model_dump(), "tags": _tags(source)}
    except (ValueError, *FETCH_ERRORS) as error:
        raise SystemExit(f"error: {error}") from error
    print(resolved if about is None else json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
