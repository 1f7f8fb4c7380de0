"""A worker of a refinement: the generator, the extractors, and what it does in a step. The rest is `training.loop`."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray.train

from meanflow_core.frechet import RawMoments
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.refinement import FrechetTerm, RefineBatch, draw_batch, draw_measurement, measure, refine_step
from meanflow_core.training import StepMetrics, TrainState, contiguous_share, new_train_state, num_passes
from pipelines.command_line import set_up_logging
from pipelines.refine.inputs import open_generator, open_metrics
from pipelines.refine.job import RefineJob
from pipelines.training import checkpoints
from pipelines.training.loop import Outcome, RunTask, Trainer, TrainingLoop, set_up_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerTask(RunTask):
    """Inputs that the driver passes to every worker."""

    job: RefineJob
    class_counts: list[int]
    """Labels are drawn in these proportions."""


def refine_worker(arguments: dict[str, Any]) -> Outcome:
    """Refines on one worker, starting from the run's last checkpoint. arguments: {"task": WorkerTask}."""
    set_up_logging()
    task: WorkerTask = arguments["task"]
    with ExitStack() as stack:
        return TrainingLoop(task, RefineTrainer(task), stack).run()


class RefineTrainer(Trainer):
    """Trains a generator by the Frechet loss."""

    def __init__(self, task: WorkerTask) -> None:
        """Opens the generator and the extractors, and builds a new state."""
        self._job, self.config, self._class_counts = task.job, task.job.config, task.class_counts
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self.device = set_up_device(
            cpu_threads=self._job.cpu_threads,
            deterministic=self._job.deterministic,
            uses_tf32=self.config.uses_tf32,
        )
        checkpoints.delete_local_leftovers()
        generator = open_generator(self._job, self.device, task.tracking_uri)
        self._pipeline, self._render = generator.pipeline, generator.renderer(self.config.num_inference_steps)
        if self.config.decoder_checkpointing:
            generator.pipeline.vae.enable_gradient_checkpointing()
        self._metrics = open_metrics(self._job, self._pipeline.image_size, self.device)
        self._references = [metric.frechet_reference(self.device) for metric in self._metrics]
        self.state = self._build_state()
        self._terms = [
            FrechetTerm(
                name=metric.label,
                features=metric.extractor.pooled,
                reference=reference,
                moments=RawMoments(
                    self.state.buffers[f"{metric.label}.mean"], self.state.buffers[f"{metric.label}.second"]
                ),
                weight=metric.weight,
            )
            for metric, reference in zip(self._metrics, self._references, strict=True)
            if metric.weight is not None
        ]
        self.metric_names = tuple(f"moving_moments/{term.name}" for term in self._terms)

    def _build_state(self) -> TrainState:
        state = new_train_state(self._pipeline.transformer.requires_grad_(True), self.config, device=self.device)
        for metric in self._metrics:
            if metric.weight is not None:
                moments = RawMoments.zeros(len(metric.reference.moments.mean), self.device)
                state.buffers |= {f"{metric.label}.mean": moments.mean, f"{metric.label}.second": moments.second}
        self._pipeline.register_modules(transformer=state.ema_network)  # for the sample grids
        return state

    def start(self) -> None:
        """See Trainer."""

    def step(self, *, may_skip: bool) -> tuple[StepMetrics, float]:
        """See Trainer. Noise and labels are drawn here, so it never waits for data."""
        size = self.config.global_batch_size
        batches = [
            draw_batch(self.config, self._class_counts, self.state.step, start, stop, self._pipeline.latent_shape)
            for start, stop in self._passes(size)
        ]
        metrics = refine_step(
            self.state, self._render, self._terms, self._on_device(batches), self.config, may_skip=may_skip
        )
        return metrics, 0.0

    def measure(self, step: int) -> dict[str, float]:
        """See Trainer: distances of all extractors, after the first step and at intervals."""
        is_due = step == 1 or step % self.config.measure_interval_steps == 0 or step == self.config.num_steps
        if not is_due:
            return {}
        size = self.config.measure_samples
        batches = (
            draw_measurement(self.config, self._class_counts, start, stop, self._pipeline.latent_shape)
            for start, stop in self._passes(size)
        )
        on_device = (self._on_device([batch])[0] for batch in batches)
        extractors = [metric.extractor.pooled for metric in self._metrics]
        sums = measure(self.state.ema_network, self._render, extractors, on_device, self.config)
        found = {
            metric.key: reference.distance(statistics)
            for metric, reference, statistics in zip(self._metrics, self._references, sums, strict=True)
        }
        if self._rank == 0:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    def pipeline(self) -> MeanFlowPipeline | None:
        """See Trainer."""
        return self._pipeline if self._rank == 0 else None

    def _passes(self, num_rows: int) -> list[tuple[int, int]]:
        """The passes of this worker over rows of a batch, or over samples of a measurement."""
        first, last = contiguous_share(num_rows, self._rank, self._world_size)
        largest = self._job.samples_per_pass or -(-self.config.global_batch_size // self._world_size)
        count = num_passes(num_rows, self._world_size, largest)
        parts = [contiguous_share(last - first, number, count) for number in range(count)]
        return [(first + start, first + stop) for start, stop in parts]

    def _on_device(self, batches: list[RefineBatch]) -> list[RefineBatch]:
        return [
            RefineBatch(noise=batch.noise.to(self.device), labels=batch.labels.to(self.device)) for batch in batches
        ]
