"""The training loop of a worker: next batch, step, log, checkpoint; at the end, rank 0 publishes."""

import contextlib
import copy
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.autoencoder import to_float_images
from pipelines.autoencoder.batches import ImageSource, ImageStream
from pipelines.autoencoder.features import EfficientNetFeatures
from pipelines.autoencoder.job import AutoencoderJob
from pipelines.autoencoder.losses import TERMS, AutoencoderLoss, Losses
from pipelines.autoencoder.network import (
    Reconstruction,
    build_autoencoder,
    learning_rate_factor,
    update_average,
)
from pipelines.autoencoder.publishing import HeldOut, publish
from pipelines.autoencoder.record import Result
from pipelines.command_line import set_up_logging
from pipelines.errors import RunError
from pipelines.progress import Progress
from pipelines.tracking.run import Run
from pipelines.training.loop import set_up_device

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """Inputs that the driver passes to every worker."""

    job: AutoencoderJob
    """The job, with absolute locations."""
    tracking_uri: str
    """MLflow tracking URI."""
    run_id: str
    """ID of the MLflow run."""
    images: ray.ObjectRef
    """The training images: an `ImageSource`."""
    held_out: ray.ObjectRef
    """The held-out images: an `ImageSource`."""


def train_worker(arguments: dict[str, Any]) -> Result | None:
    """Trains on one worker, starting from the last checkpoint. arguments: {"task": WorkerTask}.

    Returns the result on rank 0, and None on the others.
    """
    set_up_logging()
    task: WorkerTask = arguments["task"]
    rank = ray.train.get_context().get_world_rank()
    device = _set_up_device(task.job)
    trainer = AutoencoderTrainer(task.job, device)
    images = ray.get(task.images)
    if rank != 0:
        _train(trainer, task.job, images, None, None)
        return None
    run, held_out = Run(task.tracking_uri, task.run_id), HeldOut.read(ray.get(task.held_out), task.job)
    with _flushing(run), run.system_metrics("node-0"):
        _train(trainer, task.job, images, run, held_out)
        return publish(trainer.average, images, held_out, task.job, run)


@contextlib.contextmanager
def _flushing(run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        run.flush()


class AutoencoderTrainer:
    """Network, optimiser and moving average of a training."""

    def __init__(self, job: AutoencoderJob, device: torch.device) -> None:
        self._job = job
        torch.manual_seed(job.seed)  # the same initialisation on every worker
        vae = build_autoencoder(job).to(device, memory_format=torch.channels_last)
        self.network = Reconstruction(vae)
        self.average = copy.deepcopy(vae).eval().requires_grad_(False)
        self.step = 0  # completed steps
        self.sum_of_norms = torch.zeros((), device=device)
        """Sum of the gradient norms of all steps: nonfinite from the first nonfinite gradient on."""
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=job.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        needs_features = job.perceptual_weight > 0
        self._loss = AutoencoderLoss(
            kl_weight=job.kl_weight,
            perceptual_weight=job.perceptual_weight,
            features=EfficientNetFeatures().to(device) if needs_features else None,
        )
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bfloat16")

    def train_step(self, images: torch.Tensor, forward: torch.nn.Module) -> Losses:
        """One optimiser step on images float32 (B, 3, S, S) in [-1, 1]. forward: the network, or its DDP wrapper."""
        factor = learning_rate_factor(self.step, self._job.num_steps, self._job.warm_up_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._job.learning_rate * factor
        with self._autocast:
            outputs = forward(images)
        losses = self._loss(images, *(output.float() for output in outputs))
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        # A nonfinite norm makes all weights nonfinite. The next logging ends the training then, before a checkpoint.
        self.sum_of_norms += torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._job.max_gradient_norm)
        self._optimizer.step()
        self.step += 1
        update_average(self.average, self.network.vae, self._job.ema_decay, self.step)
        return losses

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {
            "step": self.step,
            "network": self.network.vae.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.step = state["step"]
        self.network.vae.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])


def _train(
    trainer: AutoencoderTrainer, job: AutoencoderJob, images: ImageSource, run: Run | None, held_out: HeldOut | None
) -> None:
    """Trains to the last step. run, held_out: on rank 0, to report to and to measure."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = next(trainer.network.parameters()).device
    _restore(trainer, device)
    if trainer.step == job.num_steps:
        return
    forward = DistributedDataParallel(trainer.network) if world_size > 1 else trainer.network
    torch.manual_seed(_mixed_seed(job.seed, rank, trainer.step))  # of the posterior noise
    batches = _image_batches(job, images, device, trainer.step)
    interval = _Interval(device, job.batch_size)
    progress = Progress(logger, "trained", "steps", job.num_steps, start=trainer.step, interval_seconds=30.0)
    note = ""
    while trainer.step < job.num_steps:
        interval.add(trainer.train_step(next(batches), forward))
        is_last = trainer.step == job.num_steps
        is_checkpoint_step = is_last or trainer.step % job.checkpoint_interval_steps == 0
        # Also before every checkpoint, so that none has nonfinite weights.
        if is_checkpoint_step or trainer.step % job.log_interval_steps == 0:
            metrics = interval.read()
            if not math.isfinite(metrics["loss"] + float(trainer.sum_of_norms)):
                raise RunError(
                    f"the loss or its gradient is not finite before step {trainer.step}; start again in another --output "
                    f"with a smaller --learning-rate"
                )
            note = f"loss {metrics['loss']:.4f}, PSNR {metrics['batch_psnr']:.2f} dB with posterior noise"
            if run is not None:
                run.log_metrics({f"autoencoder/{name}": value for name, value in metrics.items()}, trainer.step)
        if rank == 0:
            progress.update(trainer.step, note)
        if is_checkpoint_step:
            began = time.monotonic()
            if run is not None and held_out is not None and not is_last:
                psnr = held_out.psnr(trainer.average)
                logger.info("step %d: held-out PSNR %.2f dB", trainer.step, psnr)
                run.log_metrics({"autoencoder/psnr": psnr}, trainer.step)
            _save(trainer)
            interval.exclude(time.monotonic() - began)


def _image_batches(
    job: AutoencoderJob, images: ImageSource, device: torch.device, start_step: int
) -> Iterator[torch.Tensor]:
    """Yields this worker's share of each batch, without end: float32 (B / W, 3, S, S) in [-1, 1], channels last.

    start_step: a resumed training draws another order and other mirror images than its first steps.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    stream = ImageStream(
        images,
        job.image_size,
        seed=(job.seed, start_step),
        rank=rank,
        world_size=world_size,
        num_threads=max(1, (os.cpu_count() or 1) // context.get_local_world_size()),
    )
    flips = torch.Generator().manual_seed(_mixed_seed(job.seed + 1, rank, start_step))
    for pixels in stream.batches(job.batch_size // world_size):
        x = to_float_images(torch.from_numpy(pixels).to(device)).contiguous(memory_format=torch.channels_last)
        if job.mirror:
            is_mirrored = (torch.rand(len(x), generator=flips) < 0.5).to(device).view(-1, 1, 1, 1)
            x = torch.where(is_mirrored, x.flip(3), x)
        yield x


def _mixed_seed(*parts: int) -> int:
    """One seed from several numbers: any two different lists give unrelated ones."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class _Interval:
    """Means of the losses over a logging interval, of this worker's images."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device = device
        self._batch_size = batch_size
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(len(TERMS), device=self._device)
        self._num_steps = 0
        self._began = time.monotonic()

    def add(self, losses: Losses) -> None:
        """Adds a step, without waiting for the device."""
        self._sums += losses.terms()
        self._num_steps += 1

    def exclude(self, seconds: float) -> None:
        """Excludes time from the interval's rate."""
        self._began += seconds

    def read(self) -> dict[str, float]:
        """Returns the interval's metrics and starts the next interval."""
        values = dict(zip(TERMS, (self._sums / self._num_steps).tolist(), strict=True))
        seconds = max(time.monotonic() - self._began, 1e-9)
        metrics = {
            "loss": values["total"],
            "l1": values["l1"],
            "perceptual": values["perceptual"],
            "kl": values["kl"],
            # Pixels in [-1, 1] have a peak of 2, hence 2^2 = 4.
            "batch_psnr": -10.0 * math.log10(max(values["squared"], 1e-12) / 4.0),
            "images_per_second": self._num_steps * self._batch_size / seconds,
        }
        self._clear()
        return metrics


def _restore(trainer: AutoencoderTrainer, device: torch.device) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        trainer.load(torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True))
    logger.info("resumed at step %d", trainer.step)


def _save(trainer: AutoencoderTrainer) -> None:
    """Saves a checkpoint. Collective: every worker must call it at the same step."""
    metrics = {"step": trainer.step}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trainer.state(), Path(folder) / STATE_FILE)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _set_up_device(job: AutoencoderJob) -> torch.device:
    """The worker's device, with threads and TF32 set."""
    device = set_up_device(cpu_threads=job.cpu_threads, uses_tf32=job.precision != "float32")
    if device.type == "cpu":
        # Denormal numbers appear in a trained network's backward, and take CPUs several times as long.
        torch.set_flush_denormal(True)
    return device
