"""The driver: prepares a run, trains on Ray Train workers, and publishes the generators."""

import logging
from dataclasses import replace

import ray
import torch

from meanflow_core.autoencoder import weight_hash
from meanflow_core.config import TrainingConfig
from pipelines.cluster import start_ray
from pipelines.errors import InputError
from pipelines.latents.manifest import Manifest
from pipelines.plan.cost import step_flops
from pipelines.plan.job import Workload
from pipelines.plan.report import describe
from pipelines.plan.tracing import DataDependentError
from pipelines.tracking.run import Run
from pipelines.train import validation
from pipelines.train.job import TrainJob
from pipelines.train.prepare import Preparation, prepare, reload_initial_network
from pipelines.train.publishing import FinishedTraining, publish_generators
from pipelines.train.record import begin_run, new_record
from pipelines.train.short_runs import short_run_warnings
from pipelines.train.worker import WorkerTask, train_worker
from pipelines.training.driver import claim_run, open_run, run_workers, with_workers
from pipelines.training.record import TrainingRecord, write_record

logger = logging.getLogger(__name__)


def train(preset: str, job: TrainJob) -> TrainingRecord:
    """Starts or resumes a run, trains to its end, publishes its generators, and returns its record.

    Raises InputError for invalid input, RunError if training fails, and SystemExit if it is stopped.
    """
    ready = prepare(job)
    _warn_if_short(ready)
    start_ray(needed_cpus=ready.job.num_workers or 1)
    job = with_workers(ready.job, ready.job.config.global_batch_size, ready.record)
    stop_request = claim_run(job, job.config.num_steps, ready.record)
    manifest, initial = ready.manifest, ready.initial
    if ready.record is not None:
        initial = reload_initial_network(job, manifest, ready.record)
    run, record = open_run(job, ready.record, lambda tracking_uri: _begin(job, preset, ready, tracking_uri))
    with run.ends():
        validates = job.validation_data is not None and validation.has_spare_resources(job)
        if job.validation_data is not None and not validates:
            logger.info("the workers take all devices: held-out errors are measured once, after the last step")
        task = WorkerTask(
            job=job,
            tracking_uri=run.tracking_uri,
            run_id=run.run_id,
            stop_request=stop_request,
            step_flops=_step_flops(job.config, manifest),
            validates=validates,
            initial_network=None if initial is None else ray.put(initial.network),
        )
        validation_config = validation.ray_config(job, run.tracking_uri, run.run_id) if validates else None
        checkpoint, step = run_workers(train_worker, task, validation_config)
        training = FinishedTraining(job=job, preset=preset, manifest=manifest, checkpoint=checkpoint, step=step)
        return _publish(training, run, record, is_validated=validates)


def _begin(job: TrainJob, preset: str, ready: Preparation, tracking_uri: str) -> tuple[Run, TrainingRecord]:
    """Creates a new run's MLflow run and record."""
    run = begin_run(job, preset, ready.manifest, tracking_uri)
    init_sha256 = None if ready.initial is None else weight_hash(ready.initial.network)
    return run, new_record(job, preset, ready.manifest, run, init_sha256)


def dry_run(preset: str, job: TrainJob) -> str:
    """Describes the run and its costs without training. Raises InputError for invalid input."""
    ready = prepare(job)
    _warn_if_short(ready)
    job, manifest = ready.job, ready.manifest
    workload = Workload(
        config=job.config,
        images=manifest.num_samples,
        latent_shape=manifest.latent_shape,
        classes=len(manifest.class_names),
        parallelism=job.parallelism,
        samples_per_pass=job.samples_per_pass,
    )
    try:
        return describe(preset, workload, job.num_workers or torch.cuda.device_count() or 1, job.min_workers)
    except ValueError as error:
        raise InputError(str(error)) from error


def _warn_if_short(ready: Preparation) -> None:
    for warning in short_run_warnings(ready.job.config, has_initial_network=ready.initial is not None):
        logger.warning(warning)


def _step_flops(config: TrainingConfig, manifest: Manifest) -> float | None:
    """Model FLOPs of a step; None, with a warning, if they cannot be counted without data."""
    try:
        return step_flops(config, **manifest.network_sizes)
    except DataDependentError as error:
        logger.warning("model_flops_per_second is not logged: %s", error)
        return None


def _publish(training: FinishedTraining, run: Run, record: TrainingRecord, *, is_validated: bool) -> TrainingRecord:
    """Publishes the generators of the last checkpoint; validates it first if that was not done during training.

    Does nothing if this step's generators are already published. Returns the record with `published` set.
    """
    if record.published is not None and record.published.step == training.step:
        logger.info("the generators of step %d are already published", training.step)
        return record
    if training.job.validation_data is not None and not is_validated:
        logger.info("measuring the held-out errors of the last checkpoint")
        validation.validate(training.checkpoint, training.job, run.tracking_uri, run.run_id)
    record = replace(record, published=publish_generators(training, run))
    write_record(training.job, record)
    return record
