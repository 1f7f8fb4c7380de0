"""The training loop of a worker: get batches, `train_step`, log, checkpoint."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed
from ray.actor import ActorHandle
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.autoencoder import allow_tf32, forbid_tf32
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.interface import Network
from meanflow_core.objectives.interface import build_objective
from meanflow_core.sharding import shard_network
from meanflow_core.training import TrainState, build_train_state, train_step, warm_up_ddp_buckets
from pipelines.command_line import set_up_logging
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.tracking.run import Run
from pipelines.train import checkpoints
from pipelines.train.batches import BatchSource, Prefetcher
from pipelines.train.job import TrainJob
from pipelines.train.metrics import IntervalMetrics, NonfiniteDetector
from pipelines.train.publishing import training_pipeline
from pipelines.train.reporting import Reporter
from pipelines.train.stopping import SignalMonitor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """Inputs that the driver passes to every worker."""

    job: TrainJob
    """The job, with absolute locations."""
    tracking_uri: str
    """MLflow tracking URI."""
    run_id: str
    """ID of the MLflow run."""
    stop_request: ActorHandle
    """Actor that holds the driver's request to stop."""
    initial_network: ray.ObjectRef | None
    """Initial network of a warm start; ignored once there is a checkpoint."""
    step_flops: float | None
    """Floating-point operations of the model per step, over all workers; None if they cannot be counted."""
    validates: bool
    """Validate every checkpoint while training continues."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended, the same on every worker."""

    step: int
    """Completed steps."""
    was_stopped: bool = False
    """Training saved a checkpoint and stopped on request."""
    nonfinite_step: int | None = None
    """The 1-based step whose gradient was not finite; no checkpoint contains it."""


def train_worker(arguments: dict[str, Any]) -> Outcome:
    """Trains on one worker, starting from the run's last checkpoint. arguments: {"task": WorkerTask}."""
    set_up_logging()
    with ExitStack() as stack:
        return TrainingWorker(arguments["task"], stack).run()


class TrainingWorker:
    """One worker's training state, data and reports."""

    def __init__(self, task: WorkerTask, stack: ExitStack) -> None:
        """Restores the run's last committed checkpoint, or initializes a new state. stack: receives cleanup callbacks."""
        self._task, self._job, self._config = task, task.job, task.job.config
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._device = _set_up_device(self._job)
        checkpoints.delete_local_leftovers()
        dataset = open_latents(self._job.data, self._job.cache_dir, mirrored=self._config.mirror)
        # Nodes copy at different speeds. Unlike this barrier, the process group's collectives time out after 30 minutes.
        ray.train.collective.barrier()
        self._manifest = dataset.manifest
        self._vae = open_autoencoder(self._job.data)
        self._normalization = LatentNormalization.from_vae_config(self._vae.config)

        self._state = self._build_state()
        self._metrics = IntervalMetrics(build_objective(self._config.loss).metric_names, self._device)
        self._nonfinite = NonfiniteDetector()
        self._last_metrics: dict[str, float] = {}
        restored = checkpoints.restore(self._state)
        if restored is not None:
            self._metrics.restore(restored["interval_metrics"], self._rank)
            logger.info("resumed at step %d", self._state.step)
        logger.info("training as rank %d of %d workers", self._rank, self._world_size)

        self._reporter = self._build_reporter(stack, [] if restored is None else restored["unlogged"])
        source = BatchSource(
            dataset,
            self._config,
            rank=self._rank,
            world_size=self._world_size,
            device=self._device,
            samples_per_pass=self._job.samples_per_pass,
        )
        self._batches = Prefetcher(source, self._config.num_steps)
        self._network, self._no_sync = _wrap_network(self._state, self._job)
        if self._job.parallelism == "ddp" and self._state.step < self._config.num_steps:
            warm_up_ddp_buckets(self._state, self._network, source.batches(self._state.step)[0], self._config)
        self._signals = SignalMonitor(task.stop_request, self._rank)

    def _build_state(self) -> TrainState:
        initial = None
        if self._task.initial_network is not None and ray.train.get_checkpoint() is None:
            initial = ray.get(self._task.initial_network)
        return build_train_state(
            self._config,
            **self._manifest.network_sizes,
            device=self._device,
            initial=initial,
            shard=shard_network if self._job.parallelism == "fsdp2" else None,
        )

    def _build_reporter(self, stack: ExitStack, unlogged: list[dict[str, Any]]) -> Reporter | None:
        """Builds rank 0's reporter. Other ranks get None, or with FSDP2 one that logs nothing but takes part in sampling."""
        context, run = ray.train.get_context(), Run(self._task.tracking_uri, self._task.run_id)
        if context.get_local_rank() == 0:
            stack.callback(run.flush)  # at the end of training, after system_metrics
            stack.enter_context(run.system_metrics(f"node-{context.get_node_rank()}"))
        if self._rank == 0:
            run.adopt(unlogged)
        elif self._job.parallelism != "fsdp2":
            return None
        pipeline = training_pipeline(self._state.ema_network, self._vae.to(self._device), self._manifest, self._config)
        shown_run = run if self._rank == 0 else None
        return Reporter(shown_run, pipeline, self._config.num_steps, self._state.step, self._job.run_name)

    def run(self) -> Outcome:
        """Trains until the last step, a stop request or a nonfinite gradient. All workers return the same outcome."""
        config, was_stopped = self._config, False
        while self._state.step < config.num_steps and not was_stopped:
            self._train_step()
            signals = self._signals.poll()
            step, is_last = self._state.step, self._state.step == config.num_steps
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
                if self._reporter is not None and (is_last or step % config.sample_interval_steps == 0):
                    self._reporter.log_samples(step)
                if due is not None:
                    self._save_checkpoint(due)
            was_stopped = signals.stop_requested and not is_last
        self._signals.close()
        return Outcome(
            step=self._state.step, was_stopped=was_stopped, nonfinite_step=self._nonfinite.first_nonfinite_step
        )

    def _train_step(self) -> None:
        start_time = time.monotonic()
        batches = self._batches.batches(self._state.step)
        data_seconds = time.monotonic() - start_time
        metrics = train_step(
            self._state,
            self._network,
            batches,
            self._normalization,
            self._config,
            gradient_scale=float(self._world_size),
            accumulating=self._no_sync,
            may_skip=self._state.num_skipped < self._job.skip_nonfinite,
        )
        self._metrics.add(metrics, data_seconds)
        self._nonfinite.add(self._state.step, metrics)
        if metrics.skipped and self._rank == 0:
            count = f"{self._state.num_skipped} of {self._job.skip_nonfinite}"
            logger.warning("skipped step %d: its gradient is not finite (%s)", self._state.step, count)

    def _log_metrics(self) -> None:
        self._last_metrics = self._metrics.read(self._config, self._state, self._task.step_flops)
        self._metrics.clear()
        if self._reporter is not None:
            self._reporter.log_metrics(self._last_metrics, self._state.step)

    def _save_checkpoint(self, due: checkpoints.CheckpointDue) -> None:
        extra = {
            "interval_metrics": self._metrics.state(),
            "unlogged": [] if self._reporter is None else self._reporter.pending_rows(),
        }
        validate = due.validate and self._task.validates
        checkpoints.save(self._state, self._config, self._last_metrics, extra, wait=due.wait, validate=validate)


def _set_up_device(job: TrainJob) -> torch.device:
    """The worker's device, with threads, determinism and TF32 set."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        default = max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size())
        torch.set_num_threads(job.cpu_threads or default)
    elif job.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    (allow_tf32 if job.config.uses_tf32 else forbid_tf32)()
    return device


def _wrap_network(state: TrainState, job: TrainJob) -> tuple[Network, Callable[[], AbstractContextManager[None]]]:
    """Returns a network that averages gradients over workers, and the context for all passes but the last."""
    if job.parallelism == "fsdp2":
        # Every pass reduces its gradients: accumulating them unsharded would use up the memory that FSDP saves.
        return state.network, nullcontext
    wrapper = DistributedDataParallel(state.network, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return wrapper, wrapper.no_sync
