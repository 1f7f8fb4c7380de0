"""What the record and the MLflow run of a training say about it."""

import json
from typing import Any

from mlflow.entities import DatasetInput

from pipelines import storage
from pipelines.latents.manifest import Manifest, read_manifest
from pipelines.tracking.provenance import code_identity, latents_dataset
from pipelines.tracking.run import Run
from pipelines.train.job import TrainJob
from pipelines.training.record import TrainingRecord, build_record, config_identity


def identity(job: TrainJob, manifest: Manifest) -> dict[str, Any]:
    """Returns the settings and hashes that must not change on resume, as nested JSON values."""
    content = {
        "config": config_identity(job.config),
        "data_sha256": manifest.content_sha256,
        "vae_sha256": manifest.recipe.vae_sha256,
        "init_from": job.init_from,
    }
    return dict(json.loads(json.dumps(content)))


def begin_run(job: TrainJob, preset: str, manifest: Manifest, tracking_uri: str) -> Run:
    """Creates the training's MLflow run with its parameters and datasets."""
    parameters = {
        "preset": preset,
        **job.config.flat(),
        "data": storage.redact(job.data),
        "data.num_samples": manifest.num_samples,
        "data.sha256": manifest.content_sha256,
        "data.vae": manifest.recipe.vae_id,
        "data.vae_sha256": manifest.recipe.vae_sha256,
        "num_workers": job.workers,
        "parallelism": job.parallelism,
        "samples_per_pass": job.samples_per_pass,
        "init_from": job.init_from and storage.redact(job.init_from),
    }
    datasets = [_dataset(job.data, manifest, "training")]
    if job.validation_data is not None:
        datasets.append(_dataset(job.validation_data, read_manifest(job.validation_data), "validation"))
    run = Run.begin(
        tracking_uri, job.experiment, job.run_name, parameters, code_identity(), datasets, job.parent_run_id
    )
    run.log_dict(job.config.flat(), "configuration.json")
    run.log_dict(json.loads(manifest.to_json()), "data_manifest.json")
    return run


def _dataset(location: str, manifest: Manifest, context: str) -> DatasetInput:
    return latents_dataset(
        location,
        manifest.content_sha256,
        num_samples=manifest.num_samples,
        num_classes=len(manifest.class_names),
        source=manifest.source,
        context=context,
    )


def new_record(
    job: TrainJob, preset: str, manifest: Manifest, run: Run, init_sha256: str | None = None
) -> TrainingRecord:
    """Creates the record of a new run."""
    return build_record(job, preset, job.config.num_steps, identity(job, manifest), run, init_sha256)
