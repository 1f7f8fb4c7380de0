"""MLflow's model registry: registering, tagging, finding and fetching generators."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, Schema
from mlflow.types import ParamSpec as ModelParameter

from meanflow_core.generator_folder import find_generator, read_provenance
from meanflow_core.node_cache import cached_copy, cached_folder
from pipelines import storage
from pipelines.errors import InputError
from pipelines.tracking.run import Run
from pipelines.tracking.server import disable_http_retries, explain_failure, is_retryable, one_line

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

REGISTRY_SCHEMES = ("models:/", "runs:/")
CANDIDATE = "candidate"  # alias of the version that was trained last
CHAMPION = "champion"  # alias of the version that evaluation chose, for serving
MODEL_FILE = Path(__file__).with_name("mlflow_generator.py")
WEIGHTS_TAG = "transformer_sha256"  # tag of a model version: the hash of its network's weights
PATIENCE_SECONDS = 300.0  # how long registration retries a request


def register_generator(run: Run, folder: Path, name: str, tags: Mapping[str, str] = MappingProxyType({})) -> str:
    """Registers a generator folder as the next version of a model, assigns CANDIDATE to it, and returns its URI.

    tags: tags of the version. They must include WEIGHTS_TAG if `tag_generator` is to find the version later.
    The run's status does not change.
    Raises InputError if MLflow cannot be reached for five minutes.
    """
    disable_http_retries()
    # Set for the whole process: with a database, MLflow looks up the model at this global address, not at the client's.
    mlflow.set_tracking_uri(run.tracking_uri)
    client = run.client
    # pyfunc.log_model would restart the run, read the whole history of every metric, and log step 0 a second time.
    experiment_id = _with_retry(run.tracking_uri, client.get_run, run.run_id).info.experiment_id
    logged = _with_retry(
        run.tracking_uri, client.create_logged_model, experiment_id, name=name, source_run_id=run.run_id
    )
    model = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        run_id=run.run_id,
    )
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "model"
        _save_model(model, folder, local)
        _with_retry(run.tracking_uri, client.log_model_artifacts, logged.model_id, str(local))
    _with_retry(run.tracking_uri, client.finalize_logged_model, logged.model_id, "READY")
    _with_retry(run.tracking_uri, client.log_outputs, run.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        _with_retry(run.tracking_uri, client.create_registered_model, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _with_retry(
        run.tracking_uri, client.create_model_version,
        name, logged.model_uri, run_id=run.run_id, model_id=logged.model_id, tags=dict(tags),
    )  # fmt: skip
    _with_retry(run.tracking_uri, client.set_registered_model_alias, name, CANDIDATE, str(version.version))
    return f"models:/{name}@{CANDIDATE}"


def make_champion(run: Run, name: str, training_run_id: str) -> str:
    """Assigns CHAMPION to the newest version of a model that a training run registered, and returns the model's URI.

    run: any run on the same server. Raises InputError if MLflow cannot be reached for five minutes.
    """
    versions = _with_retry(
        run.tracking_uri, run.client.search_model_versions, f"name='{name}' and run_id='{training_run_id}'"
    )
    newest = max(int(version.version) for version in versions)
    move_alias(Version(name=name, number=newest, run_id=training_run_id, tracking_uri=run.tracking_uri), CHAMPION)
    return f"models:/{name}@{CHAMPION}"


def _save_model(model: Model, generator: Path, folder: Path) -> None:
    """Writes a generator as an MLflow model folder, with its signature and an input example."""
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=model,
        python_model=str(MODEL_FILE),
        artifacts={"generator": str(generator)},
        signature=ModelSignature(
            inputs=Schema([ColSpec("long", "class_label"), ColSpec("long", "seed")]),
            outputs=Schema([ColSpec("binary", "image_png")]),
            params=ParamSchema([ModelParameter("num_inference_steps", "long", 1)]),
        ),
        input_example=pd.DataFrame({"class_label": [0], "seed": [0]}),
        pip_requirements=["torch", "diffusers", "safetensors", "meanflow-ray"],
    )


def _with_retry(tracking_uri: str, request: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a request, retried every second for PATIENCE_SECONDS. Raises InputError after that."""
    deadline, has_warned = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return request(*args, **kwargs)
        except Exception as error:
            if not is_retryable(error):
                raise
            if time.monotonic() > deadline:
                raise InputError(explain_failure(tracking_uri, error)) from error
            if not has_warned:
                logger.warning("a request to MLflow at %s failed and is retried: %s", tracking_uri, one_line(error))
            has_warned = True
        time.sleep(1.0)


def tag_generator(run: Run, transformer_sha256: str, prefix: str, tags: Mapping[str, str]) -> None:
    """Tags those registered versions of a run whose network has these weights.

    Deletes their other tags that begin with `prefix`, which describe an earlier evaluation. Only warns if MLflow fails.
    """
    disable_http_retries()
    try:
        versions = run.client.search_model_versions(f"run_id = '{run.run_id}'")
        matching = [version for version in versions if version.tags.get(WEIGHTS_TAG) == transformer_sha256]
        if not matching:
            logger.info("no registered version of run %s has these weights, so none is tagged", run.run_id)
        for version in matching:
            for key in version.tags:
                if key.startswith(prefix) and key not in tags:
                    run.client.delete_model_version_tag(version.name, version.version, key)
            for key, value in tags.items():
                run.client.set_model_version_tag(version.name, version.version, key, value)
    except MlflowException as error:
        logger.warning("cannot tag the model versions of run %s: %s", run.run_id, one_line(error))


def find_run(model: str, tracking_uri: str | None) -> Run | None:
    """Finds the run that trained a model. Returns None if it is unknown.

    model: a models:/ or runs:/ URI, or a generator's folder, whose provenance.json names the run. tracking_uri: address of
    MLflow; default for a folder: the address in its provenance. Raises InputError if the provenance is damaged.
    """
    if not model.startswith(REGISTRY_SCHEMES):
        try:
            provenance = read_provenance(Path(model).expanduser())
        except ValueError as error:
            raise InputError(str(error)) from error
        address = tracking_uri or provenance.get("tracking_uri")
        return Run(address, provenance["run_id"]) if address and "run_id" in provenance else None
    if tracking_uri is None:
        return None
    if model.startswith("runs:/"):
        return Run(tracking_uri, model.removeprefix("runs:/").split("/")[0])
    version = find_version(model, tracking_uri)
    return Run(tracking_uri, version.run_id) if version is not None and version.run_id else None


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version of a model."""

    name: str
    number: int
    run_id: str | None
    """The run that trained it."""
    tracking_uri: str
    weights_sha256: str | None = None
    """Hash of its network's weights, if the version is tagged with it."""

    @property
    def uri(self) -> str:
        """Its address, which never means another version."""
        return f"models:/{self.name}/{self.number}"


def find_version(model: str, tracking_uri: str | None) -> Version | None:
    """The version that "models:/name@alias" or "models:/name/3" means now.

    None if there is no such version, or if `model` is not such a URI. Raises InputError if MLflow does not answer
    for five minutes: there may be a version.
    """
    if tracking_uri is None or not model.startswith("models:/"):
        return None
    disable_http_retries()
    client, name = MlflowClient(tracking_uri), model.removeprefix("models:/").replace("/latest", "@latest")
    by_alias = "@" in name
    parts = name.split("@" if by_alias else "/", 1)
    if len(parts) != 2:  # models:/ID
        return None
    request = client.get_model_version_by_alias if by_alias else client.get_model_version
    try:
        found = _with_retry(tracking_uri, request, *parts)
    except MlflowException:  # unknown
        return None
    return Version(
        name=found.name,
        number=int(found.version),
        run_id=found.run_id or None,
        tracking_uri=tracking_uri,
        weights_sha256=found.tags.get(WEIGHTS_TAG),
    )


def move_alias(version: Version, alias: str) -> None:
    """Assigns an alias to a version. Raises InputError if MLflow cannot be reached for five minutes."""
    client = MlflowClient(version.tracking_uri, registry_uri=version.tracking_uri)
    _with_retry(version.tracking_uri, client.set_registered_model_alias, version.name, alias, str(version.number))


def fetch_generator(model: str, tracking_uri: str | None) -> Path:
    """The local folder of a generator: a path, a URI, "models:/name@alias" or "runs:/id/name".

    Each node fetches a generator once. Raises InputError if there is no such generator.
    """
    try:
        return find_generator(_local_folder(model, tracking_uri))
    except ValueError as error:
        raise InputError(str(error)) from error


def _local_folder(model: str, tracking_uri: str | None) -> Path:
    if model.startswith(REGISTRY_SCHEMES):
        return _from_mlflow(model, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
    try:
        filesystem, path = storage.require_folder(model, "generator")
    except InputError as error:
        raise InputError(f"{error}; a generator is a folder, a URI, models:/name@alias or runs:/id/name") from error
    if storage.is_local(model):
        return Path(path)
    try:
        return cached_copy(model, filesystem, path)
    except OSError as error:
        raise InputError(f"cannot fetch {storage.redact(model)}: {error}") from error


def _from_mlflow(model: str, tracking_uri: str | None) -> Path:
    if not tracking_uri:
        raise InputError(f"model {model} is in MLflow; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    # Set for the whole process: MLflow 3.17 resolves names at the global address and ignores registry_uri.
    mlflow.set_tracking_uri(tracking_uri)
    version = find_version(model, tracking_uri)
    if version is None and ("@" in model or model.endswith("/latest")):
        raise InputError(f"cannot find {model} at {tracking_uri}")
    fixed = model if version is None else version.uri  # an alias may move
    run_id = None if version is None else version.run_id  # a new server at this address may use the same names
    try:
        return cached_folder(
            f"{tracking_uri} {fixed} {run_id}",
            lambda folder: mlflow.artifacts.download_artifacts(fixed, dst_path=str(folder)),
        )
    except (MlflowException, OSError) as error:
        raise InputError(f"cannot fetch {model} from {tracking_uri}: {error}") from error
