"""What every worker of a training does: next batches, `train_step`, log, checkpoint; and again, wherever it stopped."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from diffusers import AutoencoderKL
from ray.actor import ActorHandle
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.autoencoder import allow_tf32
from meanflow_core.config import TrainingConfig
from meanflow_core.generator import build_pipeline
from meanflow_core.grids import image_grid
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import Network
from meanflow_core.networks import AnyNetwork
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.sharding import shard_network
from meanflow_core.training import (
    TrainState,
    build_train_state,
    rehearse,
    train_step,
)
from pipelines.command_line import set_up_logging
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import Manifest
from pipelines.progress import Progress
from pipelines.tracking.run import Run
from pipelines.train import checkpoints
from pipelines.train.batches import BatchSource, Prefetcher
from pipelines.train.figures import Figures, FiniteWatch
from pipelines.train.job import TrainJob
from pipelines.train.stopping import Notices

logger = logging.getLogger(__name__)

GRID_CLASSES, GRID_SEEDS = 10, 8  # the grid of samples: rows and columns
GRID_STEPS = {1: "samples/one_step", 2: "samples/two_steps"}


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What the driver hands every worker."""

    job: TrainJob
    """The training."""
    tracking_uri: str
    """MLflow's address."""
    run_id: str
    """The MLflow run."""
    stop_request: ActorHandle | None
    """Asked whether to stop."""
    initial: ray.ObjectRef | None
    """The network to begin with, where there is no checkpoint yet."""
    step_flops: float
    """Floating-point operations of the model in a step, all workers together."""
    code: dict[str, str]
    """What runs: commit and versions; every checkpoint carries it."""
    validates: bool
    """Every checkpoint's errors on held-out data are measured beside the steps."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended, the same on every worker."""

    step: int
    """Steps taken."""
    was_asked_to_stop: bool = False
    """It left a checkpoint and went, as it was asked to."""
    nonfinite_step: int | None = None
    """The 1-based step whose gradient was not finite, and which no checkpoint holds."""


def sample_grid(pipeline: MeanFlowPipeline, num_inference_steps: int = 1) -> np.ndarray:
    """A picture of samples at fixed seeds, a row per class: uint8 (H, W, 3)."""
    num_classes = min(GRID_CLASSES, pipeline.transformer.config.num_classes)
    labels = [label for label in range(num_classes) for _ in range(GRID_SEEDS)]
    seeds = [seed for _ in range(num_classes) for seed in range(GRID_SEEDS)]
    images = pipeline.images_from_seeds(labels, seeds, num_inference_steps)
    return image_grid(images.cpu().numpy(), GRID_SEEDS)


class Observer:
    """What a training shows: figures and pictures in MLflow, progress in the log. Only the first worker shows them."""

    def __init__(self, run: Run | None, pipeline: MeanFlowPipeline, num_steps: int, first_step: int) -> None:
        self._run = run
        self._pipeline = pipeline
        self._progress = Progress(logger, "trained", "steps", num_steps, start=first_step)

    def show_figures(self, figures: dict[str, float], step: int) -> None:
        """Logs an interval's figures."""
        if self._run is None:
            return
        self._run.log_metrics(figures, step)
        self._progress.update(
            step,
            f"{figures['images_per_second']:.0f} images/s, squared error {figures['squared_error_r_equals_t']:.1f} "
            f"(r = t) {figures['squared_error_r_below_t']:.1f} (r < t)",
        )

    def show_samples(self, step: int) -> None:
        """Logs samples of the moving average at fixed seeds; with a sharded network every worker must draw them."""
        for num_inference_steps, key in GRID_STEPS.items():
            picture = sample_grid(self._pipeline, num_inference_steps)
            if self._run is not None:
                self._run.log_image(picture, key, step)

    def unlogged(self) -> list[dict[str, Any]]:
        """Rows that MLflow has not taken yet: a checkpoint carries them."""
        return [] if self._run is None else self._run.pending()

    def close(self) -> None:
        """Waits until everything is logged, within reason."""
        if self._run is not None:
            self._run.flush()


def pipeline_of(
    network: AnyNetwork, vae: AutoencoderKL, manifest: Manifest, config: TrainingConfig
) -> MeanFlowPipeline:
    """The generator that a training makes."""
    return build_pipeline(
        network,
        vae,
        manifest.class_names,
        wnids=manifest.wnids,
        is_flow_matching=config.loss.is_flow_matching,
        sampling=config.sampling,
    )


def _wrapped(state: TrainState, job: TrainJob) -> tuple[Network, Callable[[], AbstractContextManager[None]]]:
    """The network whose backward reduces gradients, and what passes but the last run in. Both average over workers."""
    if job.parallelism == "fsdp2":
        # Every pass reduces its gradients into the shards: keeping them whole until the last would take the memory
        # that sharding saves.
        return state.network, nullcontext
    wrapper = DistributedDataParallel(state.network, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return wrapper, wrapper.no_sync


def train_worker(given: dict[str, Any]) -> Outcome:
    """One worker's training, from the run's last checkpoint to its end."""
    set_up_logging()
    with ExitStack() as stack:
        return TrainingWorker(given["task"], stack).run()


class TrainingWorker:
    """One worker: its part of the state, of every step's rows, and, on the first, what is shown."""

    def __init__(self, task: WorkerTask, stack: ExitStack) -> None:
        """Restores the run's last committed checkpoint, or begins. stack: ends what must be ended with the worker."""
        self._task, self._job, self._config = task, task.job, task.job.config
        context, device = ray.train.get_context(), ray.train.torch.get_device()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        if device.type == "cpu":
            share = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
            torch.set_num_threads(self._job.cpu_threads or share)
        elif self._job.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        if self._config.precision == "tf32":
            allow_tf32()
        checkpoints.delete_scratch()

        dataset = open_latents(self._job.data, self._job.cache_dir, mirrored=self._job.mirror)
        self._manifest = dataset.manifest
        is_fresh = ray.train.get_checkpoint() is None
        self._state = build_train_state(
            self._config,
            **self._manifest.network_sizes,
            device=device,
            initial=ray.get(task.initial) if is_fresh and task.initial is not None else None,
            shard=shard_network if self._job.parallelism == "fsdp2" else None,
        )
        self._figures = Figures(device)
        self._last_figures: dict[str, float] = {}
        restored = checkpoints.restore(self._state)
        if restored is not None:
            self._figures.restore(restored["figures"], self._rank)
            logger.info("resumed at step %d", self._state.step)
            arrangement = self._arrangement()
            if self._rank == 0 and restored["arrangement"] != arrangement:
                logger.warning(
                    "the checkpoint was made by %s, this is %s: sums are rounded in another order",
                    restored["arrangement"],
                    arrangement,
                )
        logger.info("one of %d workers", self._world_size)

        run = Run(task.tracking_uri, task.run_id)
        if context.get_local_rank() == 0:
            stack.callback(run.flush)  # after the last sample
            stack.enter_context(run.system_metrics(f"node-{context.get_node_rank()}"))
        if restored is not None and self._rank == 0:
            run.adopt(restored["unlogged"])
        vae = open_autoencoder(self._job.data)
        self._normalization = LatentNormalization.from_vae_config(vae.config)
        self._observer = None
        if self._rank == 0 or self._job.parallelism == "fsdp2":
            pipeline = pipeline_of(self._state.ema_network, vae.to(device), self._manifest, self._config)
            first = run if self._rank == 0 else None
            self._observer = Observer(first, pipeline, self._config.num_steps, self._state.step)

        source = BatchSource(
            dataset,
            self._config,
            rank=self._rank,
            world_size=self._world_size,
            device=device,
            rows_per_pass=self._job.rows_per_pass,
        )
        self._source = Prefetcher(source, self._config.num_steps)
        self._graded_network, self._accumulating = _wrapped(self._state, self._job)
        if self._state.step < self._config.num_steps and self._job.parallelism == "ddp":
            rehearse(self._state, self._graded_network, source.batches(self._state.step)[0], self._config)
        self._notices, self._watch = Notices(task.stop_request, self._rank), FiniteWatch()

    def run(self) -> Outcome:
        """Takes the steps that are left. Every worker decides alike after every step."""
        ending: dict[str, Any] = {}
        while not ending and self._state.step < self._config.num_steps:
            self._take_step()
            shall_stop, machine_goes = self._notices.look()
            step, is_last = self._state.step, self._state.step == self._config.num_steps
            is_urgent = is_last or shall_stop or machine_goes
            logs = is_last or step % self._config.log_interval_steps == 0
            samples = is_last or step % self._config.sample_interval_steps == 0
            saves = is_urgent or step % self._config.checkpoint_interval_steps == 0
            if logs or saves:
                self._watch.settle()
            if self._watch.first_bad_step is not None:
                ending = {"nonfinite_step": self._watch.first_bad_step}
                break
            if logs:
                self._log()
            began = time.monotonic()
            if samples and self._observer is not None:
                self._observer.show_samples(step)
            if saves:
                # A run that stops does not wait for a validation.
                self._save(wait=is_urgent, validates=self._task.validates and not shall_stop)
            self._figures.exclude(time.monotonic() - began)
            if shall_stop and not is_last:
                ending = {"was_asked_to_stop": True}
        self._notices.close()
        if self._observer is not None:
            self._observer.close()
        return Outcome(step=self._state.step, **ending)

    def _arrangement(self) -> str:
        return f"{self._world_size} workers with {torch.get_num_threads()} threads, {self._job.parallelism}"

    def _take_step(self) -> None:
        began = time.monotonic()
        batches = self._source.batches(self._state.step)
        data_seconds = time.monotonic() - began
        metrics = train_step(
            self._state,
            self._graded_network,
            batches,
            self._normalization,
            self._config,
            gradient_scale=float(self._world_size),
            accumulating=self._accumulating,
            may_skip=self._state.num_skipped < self._job.skip_nonfinite,
        )
        self._figures.add(metrics, data_seconds)
        self._watch.add(self._state.step, metrics)
        if metrics.skipped and self._rank == 0:
            done = f"{self._state.num_skipped} of {self._job.skip_nonfinite}"
            logger.warning("the gradient of step %d is not finite: skipped, %s", self._state.step, done)

    def _log(self) -> None:
        self._last_figures = self._figures.read(self._config, self._state, self._task.step_flops)
        self._figures.clear()
        if self._observer is not None:
            self._observer.show_figures(self._last_figures, self._state.step)

    def _save(self, *, wait: bool, validates: bool) -> None:
        extra = {
            "figures": self._figures.state(),
            "unlogged": [] if self._observer is None else self._observer.unlogged(),
            "arrangement": self._arrangement(),
            "identity": self._job.identity(self._manifest),
            "code": self._task.code,
        }
        checkpoints.report(self._state, self._config, self._last_figures, extra, wait=wait, validate=validates)
