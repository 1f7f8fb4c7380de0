"""The loop of a training worker: steps, metrics, sample grids, checkpoints, stop requests.

What a step does is the stage's: a `Trainer`. The loop is the same for all.
"""

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle

from meanflow_core.autoencoder import allow_tf32, forbid_tf32
from meanflow_core.config import RunConfig
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.training import StepMetrics, TrainState
from pipelines.tracking.run import Run
from pipelines.training import checkpoints
from pipelines.training.job import RunJob
from pipelines.training.metrics import IntervalMetrics, NonfiniteDetector
from pipelines.training.reporting import Reporter
from pipelines.training.stopping import SignalMonitor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunTask:
    """What the driver passes to every worker. A stage adds its own inputs."""

    job: RunJob
    """The job, with absolute locations."""
    tracking_uri: str
    """MLflow tracking URI."""
    run_id: str
    """ID of the MLflow run."""
    stop_request: ActorHandle
    """Actor that holds the driver's request to stop."""
    step_flops: float | None = None
    """Floating-point operations of the model per step, over all workers; None if they cannot be counted."""
    validates: bool = False
    """Let Ray Train validate every checkpoint while training continues."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended, the same on every worker."""

    step: int
    """Completed steps."""
    was_stopped: bool = False
    """Training saved a checkpoint and stopped on request."""
    nonfinite_step: int | None = None
    """The 1-based step whose gradient was not finite; no checkpoint contains it."""


class Trainer(Protocol):
    """What a stage trains, and how. All methods are collective: every worker calls them after the same step."""

    config: RunConfig
    state: TrainState
    device: torch.device
    metric_names: tuple[str, ...]
    """The metrics in `StepMetrics.sums`."""

    def start(self) -> None:
        """Prepares the first step. `state` has been restored from the last checkpoint, if there is one."""

    def step(self, *, may_skip: bool) -> tuple[StepMetrics, float]:
        """Takes a step. Returns its metrics, and the seconds that it waited for data."""

    def measure(self, step: int) -> dict[str, float]:
        """Metrics that are due after step `step` (1-based) and not part of a step; usually none."""

    def pipeline(self) -> MeanFlowPipeline | None:
        """Draws the sample grids of the moving average. None if this worker takes no part in drawing them."""


class TrainingLoop:
    """Trains on one worker, starting from the run's last checkpoint."""

    def __init__(self, task: RunTask, trainer: Trainer, stack: ExitStack) -> None:
        """Restores the run's last committed checkpoint into `trainer.state`. stack: receives cleanup callbacks."""
        self._job, self._config, self._trainer = task.job, trainer.config, trainer
        self._step_flops, self._validates = task.step_flops, task.validates
        context = ray.train.get_context()
        self._rank = context.get_world_rank()
        self._metrics = IntervalMetrics(trainer.metric_names, trainer.device)
        self._nonfinite = NonfiniteDetector()
        self._last_metrics: dict[str, float] = {}
        restored = checkpoints.restore(trainer.state)
        if restored is not None:
            self._metrics.restore(restored["interval_metrics"], self._rank)
            logger.info("resumed at step %d", trainer.state.step)
        logger.info("training as rank %d of %d workers", self._rank, context.get_world_size())
        self._run = Run(task.tracking_uri, task.run_id) if self._rank == 0 else None
        self._reporter = self._build_reporter(task, stack, [] if restored is None else restored["unlogged"])
        trainer.start()
        self._signals = SignalMonitor(task.stop_request, self._rank)

    def _build_reporter(self, task: RunTask, stack: ExitStack, unlogged: list[dict[str, Any]]) -> Reporter | None:
        """Builds the reporter, which logs on rank 0 only. None on workers that take no part in sampling either."""
        context = ray.train.get_context()
        if context.get_local_rank() == 0:
            run = self._run or Run(task.tracking_uri, task.run_id)
            stack.callback(run.flush)  # at the end of training, after system_metrics
            stack.enter_context(run.system_metrics(f"node-{context.get_node_rank()}"))
        if self._run is not None:
            self._run.adopt(unlogged)
        pipeline = self._trainer.pipeline()
        if pipeline is None:
            return None
        return Reporter(self._run, pipeline, self._config.num_steps, self._trainer.state.step, self._job.run_name)

    def run(self) -> Outcome:
        """Trains until the last step, a stop request or a nonfinite gradient. All workers return the same outcome."""
        config, state, was_stopped = self._config, self._trainer.state, False
        while state.step < config.num_steps and not was_stopped:
            self._take_step()
            signals = self._signals.poll()
            step, is_last = state.step, state.step == config.num_steps
            due = checkpoints.checkpoint_due(
                step,
                num_steps=config.num_steps,
                interval_steps=config.checkpoint_interval_steps,
                stop_requested=signals.stop_requested,
                preemption_announced=signals.preemption_announced,
            )
            is_log_step = is_last or step % config.log_interval_steps == 0
            if is_log_step or due is not None:
                self._nonfinite.check()
            if self._nonfinite.first_nonfinite_step is not None:
                break
            if is_log_step:
                self._log_metrics()
            with self._metrics.paused():
                is_urgent = signals.stop_requested or signals.preemption_announced
                measured = {} if is_urgent else self._trainer.measure(step)
                if measured and self._run is not None:
                    self._run.log_metrics(measured, step)
                if self._reporter is not None and (is_last or step % config.sample_interval_steps == 0):
                    self._reporter.log_samples(step)
                if due is not None:
                    self._save_checkpoint(due)
            was_stopped = signals.stop_requested and not is_last
        self._signals.close()
        return Outcome(step=state.step, was_stopped=was_stopped, nonfinite_step=self._nonfinite.first_nonfinite_step)

    def _take_step(self) -> None:
        state, limit = self._trainer.state, self._job.skip_nonfinite
        metrics, data_seconds = self._trainer.step(may_skip=state.num_skipped < limit)
        self._metrics.add(metrics, data_seconds)
        self._nonfinite.add(state.step, metrics)
        if metrics.skipped and self._rank == 0:
            count = f"{state.num_skipped} of {limit}"
            logger.warning("skipped step %d: its gradient is not finite (%s)", state.step, count)

    def _log_metrics(self) -> None:
        state = self._trainer.state
        self._last_metrics = self._metrics.read(self._config, state, self._step_flops)
        self._metrics.clear()
        if self._reporter is not None:
            self._reporter.log_metrics(self._last_metrics, state.step)

    def _save_checkpoint(self, due: checkpoints.CheckpointDue) -> None:
        extra = {
            "interval_metrics": self._metrics.state(),
            "unlogged": [] if self._reporter is None else self._reporter.pending_rows(),
        }
        validate = due.validate and self._validates
        checkpoints.save(self._trainer.state, self._config, self._last_metrics, extra, wait=due.wait, validate=validate)


def set_up_device(*, cpu_threads: int | None, deterministic: bool = False, uses_tf32: bool) -> torch.device:
    """The worker's device, with threads, determinism and TF32 set."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        default = max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size())
        torch.set_num_threads(cpu_threads or default)
    elif deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    (allow_tf32 if uses_tf32 else forbid_tf32)()
    return device
