"""Resolves and fetches generators from folders, object stores or MLflow. The only module of deploy that imports MLflow.

    meanflow models models:/meanflow-xl2@champion      # prints the version of the alias: models:/meanflow-xl2/3

An alias can be moved at any time, and replicas start at different times. Therefore, aliases are resolved once, and all
replicas load the same version.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.messages import ModelSource
from meanflow_core.generator_folder import find_generator, read_provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from pyarrow import fs

MLFLOW_SCHEMES = ("models:/", "runs:/")


def is_in_mlflow(model: str) -> bool:
    """Whether `model` is a models:/ or runs:/ URI."""
    return model.startswith(MLFLOW_SCHEMES)


def is_in_object_store(model: str) -> bool:
    """Whether `model` is a folder in an object store."""
    return "://" in model


def is_alias(model: str) -> bool:
    """Whether `model` may refer to another version later."""
    return model.startswith("models:/") and ("@" in model or model.endswith("/latest"))


def _client(model: str, tracking_uri: str | None) -> "MlflowClient":
    import mlflow

    if not tracking_uri:
        raise ValueError(f"model {model} is in MLflow; pass tracking_uri or set MLFLOW_TRACKING_URI")
    # Set globally: MLflow 3.17 ignores registry_uri when it resolves names.
    mlflow.set_tracking_uri(tracking_uri)
    return mlflow.MlflowClient(tracking_uri)


@contextlib.contextmanager
def _as_value_error(failure: str) -> Iterator[None]:
    """Converts MLflow and network errors to a ValueError that begins with `failure`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise ValueError(f"{failure}: {error}") from error


def tracking_address(given: str | None) -> str | None:
    """The address of MLflow: the given one, or MLFLOW_TRACKING_URI; None without both."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or None


def resolve_model(model: str, tracking_uri: str | None) -> str:
    """Resolves "models:/name@alias" and "models:/name/latest" to "models:/name/3". Keeps URIs. Of a folder, returns the
    absolute path of the generator in it.

    Raises ValueError if the model does not exist.
    """
    if not is_in_mlflow(model):
        if is_in_object_store(model):
            _open_folder(model)
            return model
        folder = Path(model).expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(
                f"model {model} is not a folder; expected a generator folder, a URI such as s3://bucket/runs/a/generator, "
                f"models:/name@alias or runs:/id/name"
            )
        return str(find_generator(folder))
    import mlflow

    client = _client(model, tracking_uri)
    with _as_value_error(f"cannot find {model} at {tracking_uri}"):
        if is_alias(model):
            name, _, alias = model.removeprefix("models:/").replace("/latest", "@latest").partition("@")
            return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"
        if not mlflow.artifacts.list_artifacts(artifact_uri=model):
            raise ValueError(f"{model} at {tracking_uri} has no files")
    return model


def find_source(model: str, tracking_uri: str | None) -> ModelSource:
    """Name, version and training run of a resolved model. Fetches a generator from an object store, to read its run.

    Raises MlflowException if the lookup in MLflow fails, and ValueError for a folder that is no generator.
    """
    if not is_in_mlflow(model):
        return fetch_generator(model, None)[1]
    registered = re.fullmatch(r"models:/([^/@]+)/(\d+)", model)
    if registered:
        name, version = registered.groups()
        run_id = _client(model, tracking_uri).get_model_version(name, version).run_id
        return ModelSource(model=model, name=name, version=version, run_id=run_id, tracking_uri=tracking_uri)
    run = re.match(r"runs:/([^/]+)/(.+)", model)
    run_id = run[1] if run else None
    return ModelSource(model=model, name=model.rpartition("/")[2], run_id=run_id, tracking_uri=tracking_uri)


def _source_of_folder(model: str, folder: Path) -> ModelSource:
    # Every run calls its generator folder "generator", so the name of the run's folder is more informative.
    *_, parent, own = ["", *model.rstrip("/").split("/")]
    return ModelSource(
        model=model, name=parent if own == "generator" else own, run_id=read_provenance(folder).get("run_id")
    )


def tag_as_serving(source: ModelSource, served_name: str) -> None:
    """Sets the tag `endpoint.SERVED_NAME` of a registered model version to the UTC time at which serving started.

    Does nothing for folders and runs:/ models. Raises MlflowException if the tag cannot be set.
    """
    if source.version is None:
        return
    name = re.sub(r"[^\w.\- :]", "-", served_name)  # characters that MLflow allows in tag names
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    client = _client(source.model, source.tracking_uri)
    client.set_model_version_tag(source.name, source.version, f"endpoint.{name}", now)


def fetch_generator(model: str, tracking_uri: str | None) -> tuple[Path, ModelSource]:
    """A generator's local folder and its source. Each node fetches a generator once.

    model: a folder, a URI, "models:/name/3" or "runs:/id/name". Resolve aliases with `resolve_model` first.
    Raises ValueError if the generator does not exist or cannot be fetched.
    """
    from meanflow_core.node_cache import cached_folder

    if not is_in_mlflow(model):
        folder = find_generator(_from_object_store(model) if is_in_object_store(model) else Path(model).expanduser())
        return folder, _source_of_folder(model if is_in_object_store(model) else str(folder), folder)
    if is_alias(model):
        raise ValueError(f"{model} may refer to a different version on each replica; pass a version")
    import mlflow

    _client(model, tracking_uri)  # sets the tracking URI for the download
    with _as_value_error(f"cannot fetch {model} from {tracking_uri}"):
        source = find_source(model, tracking_uri)
        copy = cached_folder(
            # As in pipelines/tracking/registry.py, so that all stages share the copy.
            f"{tracking_uri} {model} {source.run_id if source.version else None}",
            lambda folder: mlflow.artifacts.download_artifacts(model, dst_path=str(folder)),
        )
    return find_generator(copy), source


def _open_folder(uri: str) -> tuple["fs.FileSystem", str]:
    """The file system of a URI, and the path in it. Raises ValueError if it is not an existing folder."""
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        is_folder = filesystem.get_file_info(path).type == fs.FileType.Directory
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot find model {uri}: {error}") from error
    if not is_folder:
        raise ValueError(f"cannot find model {uri}: there is no such folder")
    return filesystem, path


def _from_object_store(uri: str) -> Path:
    from meanflow_core.node_cache import cached_copy

    filesystem, path = _open_folder(uri)
    with _as_value_error(f"cannot fetch {uri}"):
        return cached_copy(uri, filesystem, path)


def describe_model(model: str, tracking_uri: str | None) -> str:
    """The source and registry tags of a resolved model, as JSON."""
    source = find_source(model, tracking_uri)
    tags: dict[str, str] = {}
    if source.version is not None:
        tags = dict(_client(model, tracking_uri).get_model_version(source.name, source.version).tags)
    return json.dumps({**source.model_dump(), "tags": tags}, indent=2)


def main() -> None:
    """Prints a model with its alias resolved, or its details as JSON."""
    parser = argparse.ArgumentParser(
        prog="meanflow models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder, URI, models:/name@alias, models:/name/version or runs:/id/name")
    parser.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"))
    parser.add_argument("--json", action="store_true", help="print source, training run and registry tags as JSON")
    arguments = parser.parse_args()
    try:
        resolved = resolve_model(arguments.model, arguments.tracking_uri)
        output = resolved
        if arguments.json:
            with _as_value_error(f"cannot look up {resolved}"):
                output = describe_model(resolved, arguments.tracking_uri)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(output)


if __name__ == "__main__":
    main()
