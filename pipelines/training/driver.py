"""What the drivers of all training stages do: choose the workers, run them on Ray Train, and explain how they ended."""

import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

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
from pipelines.cluster import choose_gpus, num_gpus
from pipelines.errors import InputError
from pipelines.training import failures, stopping
from pipelines.training.job import RunJob
from pipelines.training.loop import Outcome
from pipelines.training.record import TrainingRecord

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


def run_workers(
    worker: Callable[[dict[str, Any]], Outcome],
    task: object,
    job: RunJob,
    stop_request: ActorHandle,
    validation_config: ValidationConfig | None = None,
) -> tuple[Checkpoint, int]:
    """Runs `worker({"task": task})` on all workers until training ends. Returns the last checkpoint and its step.

    Raises RunError after too many failures or a nonfinite gradient, InputError for invalid input, and SystemExit if training
    was stopped.
    """
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
        with stopping.stop_on_sigterm(stop_request):
            result = trainer.fit()
    except TrainingFailedError as error:
        logger.error("training failed", exc_info=error)
        raise failures.as_command_error(error, job) from error
    _require_finished(job, result.return_value)
    assert result.checkpoint is not None, "the last step always saves a checkpoint"
    return result.checkpoint, result.return_value.step


def _require_finished(job: RunJob, outcome: Outcome) -> None:
    """Raises RunError after a nonfinite gradient, SystemExit if training was stopped."""
    if outcome.nonfinite_step is not None:
        raise failures.nonfinite_error(job, outcome.nonfinite_step)
    if outcome.was_stopped:
        print(f"stopped at step {outcome.step} with a checkpoint; the same command resumes from it", flush=True)
        raise SystemExit(128 + signal.SIGTERM)
