"""Reports metrics and sample grids to MLflow, and progress to the log."""

import logging
from typing import Any

import numpy as np

from meanflow_core.grids import image_grid
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.predictions import needs_many_steps
from pipelines.progress import Progress
from pipelines.tracking.run import Run

logger = logging.getLogger(__name__)

GRID_CLASSES, GRID_SEEDS = 10, 8  # rows and columns of the sample grid
# {number of sampling steps: name of the grid}
FEW_STEPS = {1: "samples/one_step", 2: "samples/two_steps"}
MANY_STEPS = {10: "samples/10_steps", 25: "samples/25_steps"}  # of flow matching and diffusion


def sample_grid(pipeline: MeanFlowPipeline, num_inference_steps: int = 1) -> np.ndarray:
    """Generates a grid of samples with fixed seeds, one row per class: uint8 (H, W, 3)."""
    num_classes = min(GRID_CLASSES, pipeline.transformer.config.num_classes)
    labels = [label for label in range(num_classes) for _ in range(GRID_SEEDS)]
    seeds = [seed for _ in range(num_classes) for seed in range(GRID_SEEDS)]
    images = pipeline.images_from_seeds(labels, seeds, num_inference_steps)
    return image_grid(images.cpu().numpy(), GRID_SEEDS)


def _errors(metrics: dict[str, float]) -> list[str]:
    """The objective's squared errors, for the progress line: "squared error r equals t 12.3"."""
    names = [name for name in metrics if name.startswith("squared_error") and "/" not in name]
    return [f"{name.replace('_', ' ')} {metrics[name]:.1f}" for name in names]


class Reporter:
    """Reports metrics and samples.

    Without a `run`, it reports nothing and only joins the sampling of a sharded network, which needs every process.
    """

    def __init__(
        self, run: Run | None, pipeline: MeanFlowPipeline, num_steps: int, first_step: int, name: str = "this run"
    ) -> None:
        self._run = run
        self._pipeline = pipeline
        self._progress = Progress(logger, f"{name}: trained", "steps", num_steps, start=first_step)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Logs an interval's metrics."""
        if self._run is None:
            return
        self._run.log_metrics(metrics, step)
        self._progress.update(
            step,
            ", ".join([f"{metrics['images_per_second']:.0f} images/s", *_errors(metrics)]),
        )

    def log_samples(self, step: int) -> None:
        """Logs sample grids of the moving average; collective if the network is sharded."""
        needs_many = needs_many_steps(self._pipeline.config.prediction)
        for num_inference_steps, key in (MANY_STEPS if needs_many else FEW_STEPS).items():
            grid = sample_grid(self._pipeline, num_inference_steps)
            if self._run is not None:
                self._run.log_image(grid, key, step)

    def pending_rows(self) -> list[dict[str, Any]]:
        """Returns metrics that MLflow has not stored yet, to be saved in a checkpoint."""
        return [] if self._run is None else self._run.pending()
