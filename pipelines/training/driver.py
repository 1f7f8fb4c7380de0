"""What the drivers of all training stages do: choose the workers, run them on Ray Train, and explain how they ended."""

import functools
import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    ValidationConfig,
)
from ray.train.torch import TorchTrainer

from pipelines import storage
from pipelines.cluster import choose_gpus, describe_waiting, num_gpus
from pipelines.errors import InputError
from pipelines.tracking.run import Run
from pipelines.tracking.server import resolve_tracking_uri
from pipelines.training import checkpoints, failures, stopping
from pipelines.training.job import RunJob
from pipelines.training.loop import Outcome, RunTask
from pipelines.training.record import TrainingRecord, resume_run, write_record

logger = logging.getLogger(__name__)

Job = TypeVar("Job", bound=RunJob)


def with_workers(job: Job, global_batch_size: int, record: TrainingRecord | None) -> Job:
    """Replaces the defaults of device and number of workers by what the cluster has.

    A resumed run keeps its device; a new run uses GPUs if there are any. Raises InputError for more workers than samples
    in a batch.
    """
    device = record.device if record is not None and job.device == "auto" else job.device
    use_gpu = choose_gpus(device, job.min_workers or job.num_workers or 1)
    num_workers = job.num_workers or max(1, job.min_workers or 0, num_gpus() if use_gpu else 0)
    if global_batch_size < num_workers:
        raise InputError(
            f"global_batch_size {global_batch_size} must be at least the number of workers, but there are {num_workers}; "
            f"choose a smaller --num-workers"
        )
    return replace(job, device="gpu" if use_gpu else "cpu", num_workers=num_workers)


def claim_run(job: RunJob, num_steps: int, record: TrainingRecord | None) -> ActorHandle:
    """Claims a run, so that no other job of this cluster trains it, and repairs its checkpoints. Ray must have been started.

    record: of the run to resume; None for a new one. Returns the actor that holds the driver's request to stop.

    Raises InputError if another job of this cluster trains the run, if it has more than `num_steps` steps already, or if
    all its checkpoints are damaged.
    """
    stop_request = stopping.claim_run(job.run_location)
    if record is not None:
        filesystem, run_path = storage.open_storage(job.run_location)
        checkpoints.repair_record(filesystem, run_path)
        checkpoints.delete_orphans(filesystem, run_path)
        require_steps_left(job, num_steps)
    return stop_request


def open_run(
    job: RunJob, record: TrainingRecord | None, begin: Callable[[str], tuple[Run, TrainingRecord]]
) -> tuple[Run, TrainingRecord]:
    """Starts or resumes the MLflow run of a claimed run. Returns it, and the record.

    begin: makes a new run's MLflow run and record; its argument is the tracking URI.
    """
    tracking_uri = resolve_tracking_uri(job.storage, num_nodes=sum(node["Alive"] for node in ray.nodes()))
    if record is None:
        run, record = begin(tracking_uri)
        write_record(job, record)
    else:
        record = replace(record, tracking_uri=tracking_uri)
        run = resume_run(record)
    logger.info("MLflow run %s at %s", run.run_id, tracking_uri)
    return run, record


def require_steps_left(job: RunJob, num_steps: int) -> None:
    """Raises InputError if the run's last checkpoint has more than `num_steps` steps."""
    latest = checkpoints.committed(*storage.open_storage(job.run_location))
    if latest is not None and latest.step > num_steps:
        raise InputError(
            f"run {job.run_name} already has {latest.step} steps, but num_steps is {num_steps}; increase --num-steps, or "
            f"choose another --run-name"
        )


def run_workers(
    worker: Callable[[dict[str, Any]], Outcome],
    task: RunTask,
    validation_config: ValidationConfig | None = None,
) -> tuple[Checkpoint, int]:
    """Runs `worker({"task": task})` on all workers until training ends. Returns the last checkpoint and its step.

    Raises RunError after too many failures or a nonfinite gradient, InputError for invalid input, and SystemExit if training
    was stopped.
    """
    job = task.job
    filesystem, root = storage.open_storage(job.storage)
    trainer = TorchTrainer(
        worker,
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
        validation_config=validation_config,
    )
    try:
        with stopping.stop_on_signals(task.stop_request) as signals:
            waiting = functools.partial(describe_waiting, job.min_workers or job.workers, use_gpu=job.device == "gpu")
            result = stopping.fit_in_thread(trainer, task.stop_request, waiting)
    except TrainingFailedError as error:
        logger.error("training failed", exc_info=error)
        raise failures.as_command_error(error, job) from error
    _require_finished(job, result.return_value, signals)
    assert result.checkpoint is not None, "the last step always saves a checkpoint"
    checkpoints.delete_orphans(*storage.open_storage(job.run_location))
    return result.checkpoint, result.return_value.step


def _require_finished(job: RunJob, outcome: Outcome, signals: list[int]) -> None:
    """Raises RunError after a nonfinite gradient, SystemExit if training was stopped."""
    if outcome.nonfinite_step is not None:
        raise failures.nonfinite_error(job, outcome.nonfinite_step)
    if outcome.was_stopped:
        print(f"stopped at step {outcome.step} with a checkpoint; the same command resumes from it", flush=True)
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
