"""A run's training.json: what was begun, with what, and which MLflow run tracks it. Continued, never begun twice."""

import json
import logging
from typing import Any

from mlflow.entities import DatasetInput
from pyarrow import fs

from meanflow_core.config import flatten
from pipelines import storage
from pipelines.errors import InputError
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.tracking.provenance import code_identity, latents_used
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob

logger = logging.getLogger(__name__)

TRAINING_RECORD = "training.json"


def read_record(job: TrainJob) -> dict[str, Any] | None:
    """A run's training.json: what it is, and which MLflow run tracks it; None where no run of this name was begun.

    Raises InputError where its folder holds something else.
    """
    filesystem, folder = storage.open_storage(job.run_location)
    if filesystem.get_file_info(f"{folder}/{TRAINING_RECORD}").type == fs.FileType.File:
        return dict(json.loads(storage.read_bytes(filesystem, f"{folder}/{TRAINING_RECORD}")))
    if filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        raise InputError(
            f"{job.run_location} holds something else than a run of pipelines.train (it has no "
            f"{TRAINING_RECORD}); choose another --run-name or --storage"
        )
    return None


def write_record(job: TrainJob, content: dict[str, Any]) -> None:
    """Writes a run's record, whole or not at all."""
    filesystem, folder = storage.open_storage(job.run_location)
    storage.write_bytes(filesystem, f"{folder}/{TRAINING_RECORD}", (json.dumps(content, indent=2) + "\n").encode())


def require_same(job: TrainJob, manifest: Manifest, begun: dict[str, Any]) -> None:
    """Raises InputError where a run was begun with another experiment; warns of other code."""
    then, now = flatten(begun["identity"]), flatten(json.loads(json.dumps(job.identity(manifest))))
    different = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if different:
        changes = "; ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in different)
        raise InputError(
            f"run {job.run_name} in {job.storage} is another experiment ({changes}); choose another --run-name"
        )
    code = begun.get("code", {})
    changed = [
        f"{name} was {code.get(name)}, is {value}" for name, value in code_identity().items() if code.get(name) != value
    ]
    if changed:
        logger.warning("the run was begun with other code, and may not repeat itself: %s", "; ".join(changed))
    if job.config.optimizer.cooldown_steps and begun.get("num_steps") != job.config.num_steps:
        logger.warning(
            "num_steps was %s, is %d: the last steps' falling rate moves with it",
            begun.get("num_steps"),
            job.config.num_steps,
        )


def begin_or_resume_run(
    job: TrainJob,
    preset: str,
    manifest: Manifest,
    tracking_uri: str,
    begun: dict[str, Any] | None = None,
    init_sha256: str | None = None,
) -> tuple[Run, dict[str, Any]]:
    """The training's MLflow run and its record, both new where no run of this name was begun."""
    if begun is not None:
        run = Run(tracking_uri, begun["mlflow_run_id"])
        run.resume()
        return run, begun
    parameters = {
        "preset": preset,
        **job.config.flat(),
        "data": storage.shown(job.data),
        "data.num_samples": manifest.num_samples,
        "data.sha256": manifest.content_sha256,
        "data.mirror": job.mirror,
        "data.vae": manifest.recipe.vae_id,
        "data.vae_sha256": manifest.recipe.vae_sha256,
        "num_workers": job.num_workers,
        "parallelism": job.parallelism,
        "rows_per_pass": job.rows_per_pass,
        "init_from": job.init_from and storage.shown(job.init_from),
    }
    code = code_identity()
    datasets = [_dataset(job.data, manifest, "training")]
    if job.validation_data is not None:
        held_out = read_manifest(job.validation_data)
        datasets.append(_dataset(job.validation_data, held_out, "validation"))
    run = Run.begin(tracking_uri, job.experiment, job.run_name, parameters, tags=code, datasets=datasets)
    record = {
        "identity": job.identity(manifest),
        "preset": preset,
        "num_steps": job.config.num_steps,
        "init_sha256": init_sha256,
        "device": job.device,
        "mlflow_run_id": run.run_id,
        "tracking_uri": tracking_uri,
        "code": code,
    }
    write_record(job, record)
    run.log_dict(job.config.flat(), "configuration.json")
    run.log_dict(json.loads(manifest.to_json()), "data_manifest.json")
    return run, record


def _dataset(location: str, manifest: Manifest, context: str) -> DatasetInput:
    return latents_used(
        location,
        manifest.content_sha256,
        num_samples=manifest.num_samples,
        num_classes=len(manifest.class_names),
        source=manifest.source,
        context=context,
    )
