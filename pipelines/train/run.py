"""The driver: prepares a run, trains on Ray Train workers, and publishes the generators."""

import logging
from dataclasses import replace

import ray
import torch

from meanflow_core.autoencoder import weight_hash
from meanflow_core.config import TrainingConfig
from pipelines import storage
from pipelines.cluster import start_ray
from pipelines.errors import InputError
from pipelines.latents.manifest import Manifest
from pipelines.plan.cost import step_flops
from pipelines.plan.job import Workload
from pipelines.plan.report import describe
from pipelines.plan.tracing import DataDependentError
from pipelines.tracking.run import Run
from pipelines.tracking.server import resolve_tracking_uri
from pipelines.train import validation
from pipelines.train.job import TrainJob
from pipelines.train.prepare import prepare, reload_initial_network
from pipelines.train.publishing import FinishedTraining, publish_generators
from pipelines.train.record import begin_run, new_record
from pipelines.train.worker import WorkerTask, train_worker
from pipelines.training import checkpoints, stopping
from pipelines.training.driver import run_workers, with_workers
from pipelines.training.loop import RunTask
from pipelines.training.record import TrainingRecord, resume_run, write_record

logger = logging.getLogger(__name__)


def train(preset: str, job: TrainJob) -> TrainingRecord:
    """Starts or resumes a run, trains to its end, publishes its generators, and returns its record.

    Raises InputError for invalid input, RunError if training fails, and SystemExit if it is stopped.
    """
    ready = prepare(job)
    job, manifest, record, initial = ready.job, ready.manifest, ready.record, ready.initial
    start_ray(needed_cpus=job.num_workers or 1)
    job = with_workers(job, job.config.global_batch_size, record)
    tracking_uri = resolve_tracking_uri(job.storage, num_nodes=sum(node["Alive"] for node in ray.nodes()))
    stop_request = stopping.claim_run(job.run_location)
    filesystem, run_path = storage.open_storage(job.run_location)
    if record is None:
        run = begin_run(job, preset, manifest, tracking_uri)
        record = new_record(job, preset, manifest, run, None if initial is None else weight_hash(initial.network))
        write_record(job, record)
    else:
        checkpoints.repair_record(filesystem, run_path)
        checkpoints.delete_orphans(filesystem, run_path)
        initial = reload_initial_network(job, manifest, record)
        record = replace(record, tracking_uri=tracking_uri)
        run = resume_run(record)
    with run.ends():
        logger.info("MLflow run %s at %s", run.run_id, tracking_uri)
        for key, value in job.config.flat().items():
            logger.info("  %s = %s", key, value)
        validates = job.validation_data is not None and validation.has_spare_resources(job)
        task = WorkerTask(
            job=job,
            run=RunTask(
                job=job,
                config=job.config,
                tracking_uri=run.tracking_uri,
                run_id=run.run_id,
                stop_request=stop_request,
                step_flops=_step_flops(job.config, manifest),
                validates=validates,
            ),
            initial_network=None if initial is None else ray.put(initial.network),
        )
        validation_config = validation.ray_config(job, run.tracking_uri, run.run_id) if validates else None
        checkpoint, step = run_workers(train_worker, task, job, stop_request, validation_config)
        checkpoints.delete_orphans(filesystem, run_path)
        training = FinishedTraining(job=job, preset=preset, manifest=manifest, checkpoint=checkpoint, step=step)
        return _publish(training, run, record, is_validated=validates)


def dry_run(preset: str, job: TrainJob) -> str:
    """Describes the run and its costs without training. Raises InputError for invalid input."""
    ready = prepare(job)
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
        logger.info("validating the last checkpoint now: there were no spare resources during training")
        validation.validate(training.checkpoint, training.job, run.tracking_uri, run.run_id)
    record = replace(record, published=publish_generators(training, run))
    write_record(training.job, record)
    return record
