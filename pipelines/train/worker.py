"""A worker of a training: its data, its network, and what it does in a step. The rest is `pipelines.training.loop`."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.interface import Network
from meanflow_core.objectives.interface import build_objective
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.sharding import shard_network
from meanflow_core.training import StepMetrics, TrainState, build_train_state, train_step, warm_up_ddp_buckets
from pipelines.command_line import set_up_logging
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.train.batches import BatchSource, Prefetcher
from pipelines.train.job import TrainJob
from pipelines.train.publishing import training_pipeline
from pipelines.training import checkpoints
from pipelines.training.loop import Outcome, RunTask, Trainer, TrainingLoop, set_up_device


@dataclass(frozen=True, kw_only=True)
class WorkerTask(RunTask):
    """Inputs that the driver passes to every worker."""

    job: TrainJob
    initial_network: ray.ObjectRef | None
    """Initial network of a warm start; ignored once there is a checkpoint."""


def train_worker(arguments: dict[str, Any]) -> Outcome:
    """Trains on one worker, starting from the run's last checkpoint. arguments: {"task": WorkerTask}."""
    set_up_logging()
    task: WorkerTask = arguments["task"]
    with ExitStack() as stack:
        return TrainingLoop(task, MeanFlowTrainer(task), stack).run()


class MeanFlowTrainer(Trainer):
    """Trains a network with an objective on a latent dataset."""

    def __init__(self, task: WorkerTask) -> None:
        """Opens the data and builds a new state."""
        self._task, self._job, self.config = task, task.job, task.job.config
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self.device = set_up_device(
            cpu_threads=self._job.cpu_threads,
            deterministic=self._job.deterministic,
            uses_tf32=self.config.uses_tf32,
        )
        checkpoints.delete_local_leftovers()
        self._dataset = open_latents(self._job.data, self._job.cache_dir, mirrored=self.config.mirror)
        # Nodes copy at different speeds. Unlike this barrier, the process group's collectives time out after 30 minutes.
        ray.train.collective.barrier()
        self._vae = open_autoencoder(self._job.data)
        self._normalization = LatentNormalization.from_vae_config(self._vae.config)
        self.metric_names = build_objective(self.config.loss).metric_names
        self.state = self._build_state()

    def _build_state(self) -> TrainState:
        initial = None
        if self._task.initial_network is not None and ray.train.get_checkpoint() is None:
            initial = ray.get(self._task.initial_network)
        return build_train_state(
            self.config,
            **self._dataset.manifest.network_sizes,
            device=self.device,
            initial=initial,
            shard=shard_network if self._job.parallelism == "fsdp2" else None,
        )

    def start(self) -> None:
        """See Trainer."""
        source = BatchSource(
            self._dataset,
            self.config,
            rank=self._rank,
            world_size=self._world_size,
            device=self.device,
            samples_per_pass=self._job.samples_per_pass,
        )
        self._batches = Prefetcher(source, self.config.num_steps)
        self._network, self._no_sync = _wrap_network(self.state, self._job)
        if self._job.parallelism == "ddp" and self.state.step < self.config.num_steps:
            warm_up_ddp_buckets(self.state, self._network, source.batches(self.state.step)[0], self.config)

    def step(self, *, may_skip: bool) -> tuple[StepMetrics, float]:
        """See Trainer."""
        start_time = time.monotonic()
        batches = self._batches.batches(self.state.step)
        data_seconds = time.monotonic() - start_time
        metrics = train_step(
            self.state,
            self._network,
            batches,
            self._normalization,
            self.config,
            gradient_scale=float(self._world_size),
            accumulating=self._no_sync,
            may_skip=may_skip,
        )
        return metrics, data_seconds

    def measure(self, step: int) -> dict[str, float]:
        """See Trainer: held-out errors are measured by another task (`validation`)."""
        return {}

    def pipeline(self) -> MeanFlowPipeline | None:
        """See Trainer. Sampling from a sharded network needs all workers."""
        if self._rank != 0 and self._job.parallelism != "fsdp2":
            return None
        manifest = self._dataset.manifest
        return training_pipeline(self.state.ema_network, self._vae.to(self.device), manifest, self.config)


def _wrap_network(state: TrainState, job: TrainJob) -> tuple[Network, Callable[[], AbstractContextManager[None]]]:
    """Returns a network that averages gradients over workers, and the context for all passes but the last."""
    if job.parallelism == "fsdp2":
        # Every pass reduces its gradients: accumulating them unsharded would use up the memory that FSDP saves.
        return state.network, nullcontext
    wrapper = DistributedDataParallel(state.network, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return wrapper, wrapper.no_sync
