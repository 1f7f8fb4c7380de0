"""The driver: prepares a run, trains on Ray Train workers, and publishes the generators."""

import logging
import signal
from dataclasses import replace

import ray
import torch
from ray.actor import ActorHandle
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer

from meanflow_core.autoencoder import weight_hash
from meanflow_core.config import TrainingConfig
from pipelines import storage
from pipelines.cluster import choose_gpus, num_gpus, start_ray
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
from pipelines.train.record import TrainingRecord, begin_run, new_record, resume_run, write_record
from pipelines.train.warm_start import InitialNetwork
from pipelines.train.worker import WorkerTask, train_worker
from pipelines.training import checkpoints, failures, stopping
from pipelines.training.loop import Outcome, RunTask

logger = logging.getLogger(__name__)


def train(preset: str, job: TrainJob) -> TrainingRecord:
    """Starts or resumes a run, trains to its end, publishes its generators, and returns its record.

    Raises InputError for invalid input, RunError if training fails, and SystemExit if it is stopped.
    """
    ready = prepare(job)
    job, manifest, record, initial = ready.job, ready.manifest, ready.record, ready.initial
    start_ray(needed_cpus=job.num_workers or 1)
    job = with_workers(job, record)
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
        result = _run_workers(job, manifest, run, stop_request, initial, validates=validates)
        checkpoints.delete_orphans(filesystem, run_path)
        _require_finished(job, result.return_value)
        checkpoint, step = result.checkpoint, result.return_value.step
        assert checkpoint is not None, "the last step always saves a checkpoint"
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


def with_workers(job: TrainJob, record: TrainingRecord | None) -> TrainJob:
    """Replaces the defaults of device and number of workers by what the cluster has.

    A resumed run keeps its device; a new run uses GPUs if there are any. Raises InputError for more workers than samples
    in a batch.
    """
    device = record.device if record is not None and job.device == "auto" else job.device
    use_gpu = choose_gpus(device, job.min_workers or job.num_workers or 1)
    num_workers = job.num_workers or max(1, job.min_workers or 0, num_gpus() if use_gpu else 0)
    if job.config.global_batch_size < num_workers:
        raise InputError(
            f"global_batch_size {job.config.global_batch_size} must be at least the number of workers, but there are "
            f"{num_workers}; choose a smaller --num-workers"
        )
    return replace(job, device="gpu" if use_gpu else "cpu", num_workers=num_workers)


def _run_workers(
    job: TrainJob,
    manifest: Manifest,
    run: Run,
    stop_request: ActorHandle,
    initial: InitialNetwork | None,
    *,
    validates: bool,
) -> Result:
    """Runs the workers until training ends. Raises RunError after too many failures, InputError for invalid input."""
    filesystem, root = storage.open_storage(job.storage)
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
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=job.workers if job.min_workers is None else (job.min_workers, job.workers),
            use_gpu=job.device == "gpu",
            elastic_resize_monitor_interval_s=job.resize_interval_seconds,
        ),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=root,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=job.keep_checkpoints),
            failure_config=FailureConfig(max_failures=job.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        validation_config=validation.ray_config(job, run.tracking_uri, run.run_id) if validates else None,
    )
    try:
        with stopping.stop_on_sigterm(stop_request):
            return trainer.fit()
    except TrainingFailedError as error:
        logger.error("training failed", exc_info=error)
        raise failures.as_command_error(error, job) from error


def _step_flops(config: TrainingConfig, manifest: Manifest) -> float | None:
    """Model FLOPs of a step; None, with a warning, if they cannot be counted without data."""
    try:
        return step_flops(config, **manifest.network_sizes)
    except DataDependentError as error:
        logger.warning("model_flops_per_second is not logged: %s", error)
        return None


def _require_finished(job: TrainJob, outcome: Outcome) -> None:
    """Raises RunError after a nonfinite gradient, SystemExit if training was stopped."""
    if outcome.nonfinite_step is not None:
        raise failures.nonfinite_error(job, outcome.nonfinite_step)
    if outcome.was_stopped:
        print(f"stopped at step {outcome.step} with a checkpoint; the same command resumes from it", flush=True)
        raise SystemExit(128 + signal.SIGTERM)


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
