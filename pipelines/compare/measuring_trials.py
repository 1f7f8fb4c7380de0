"""Measures trained trials: Fréchet distance and class accuracy at several numbers of function evaluations (NFE).

Every call of the network counts: a step of Heun's method takes two. Every generator draws the same seeds and classes.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import ray
import torch
from pyarrow import fs

from meanflow_core.config import TrainingConfig
from meanflow_core.generator import load_pipeline
from meanflow_core.metrics import FeatureStatistics, frechet_distance
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.command_line import set_up_logging
from pipelines.compare.methods import Trial
from pipelines.compare.training_trials import as_completed
from pipelines.evaluate.judge import Judge, load_judge
from pipelines.evaluate.samples import SampleRule
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

BATCH_SIZE = 50
RULE = SampleRule(base_seed=0, labels="balanced")


@dataclass(frozen=True, kw_only=True)
class SamplingPoint:
    """A solver with a number of function evaluations."""

    solver: Literal["euler", "heun"]
    """MeanFlow's steps along the average velocity are also called euler."""
    nfe: int
    """Function evaluations per image."""

    @property
    def num_steps(self) -> int:
        """Steps that take this many function evaluations."""
        return self.nfe // 2 if self.solver == "heun" else self.nfe

    @property
    def file(self) -> str:
        """File of the measurement within a trial's folder."""
        return f"measured/{self.solver}-{self.nfe}-nfe.json"


def sampling_points(config: TrainingConfig, nfe: Sequence[int]) -> list[SamplingPoint]:
    """How a method is sampled: by Euler steps, and for flow matching also by Heun's method where the NFE is even."""
    points = [SamplingPoint(solver="euler", nfe=count) for count in nfe]
    if config.loss.prediction == "velocity":
        points += [SamplingPoint(solver="heun", nfe=count) for count in nfe if count % 2 == 0]
    return points


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measurements of a set of images."""

    frechet: float
    """Fréchet distance to the training images in the judge's features."""
    accuracy: float
    """Fraction of the images that the judge assigns to their class."""


def measure(judge: Judge, train: FeatureStatistics, images: torch.Tensor, labels: torch.Tensor) -> Quality:
    """Measures uint8 images (N, H, W, 3) of classes (N,) against the statistics of the training images' features."""
    judged = judge.predict(images)
    return Quality(
        frechet=frechet_distance(FeatureStatistics.of(judged.features), train),
        accuracy=float((judged.labels == labels).double().mean()),
    )


def draw_images(pipeline: MeanFlowPipeline, point: SamplingPoint, indices: Sequence[int]) -> torch.Tensor:
    """Draws samples by index, uint8 (N, H, W, 3) on the CPU: sample i has class i mod num_classes and seed i."""
    numbers = np.asarray(indices)
    labels = RULE.labels_of(numbers, pipeline.transformer.config.num_classes).tolist()
    seeds = RULE.seeds_of(numbers)
    batches = [
        pipeline.images_from_seeds(
            labels[start : start + BATCH_SIZE],
            seeds[start : start + BATCH_SIZE],
            point.num_steps,
            solver=point.solver,
        ).cpu()
        for start in range(0, len(seeds), BATCH_SIZE)
    ]
    return torch.cat(batches)


def read_quality(folder: Path, point: SamplingPoint) -> Quality | None:
    """The measurement of a trial's folder at a point; None if there is none."""
    path = folder / point.file
    return Quality(**json.loads(path.read_text())) if path.is_file() else None


def missing_points(trial: Trial, folder: Path, nfe: Sequence[int]) -> list[SamplingPoint]:
    """Points at which a trial has not been measured."""
    return [point for point in sampling_points(trial.config, nfe) if read_quality(folder / trial.name, point) is None]


def measure_trial(
    folder: Path,
    points: Sequence[SamplingPoint],
    judge: Judge,
    train: FeatureStatistics,
    num_samples: int,
    device: torch.device | None = None,
) -> None:
    """Measures the generator in a trial's folder in this process and writes a file per point."""
    pipeline = load_pipeline(folder / "generator", device or torch.device("cpu"))
    indices = np.arange(num_samples)
    labels = torch.from_numpy(RULE.labels_of(indices, pipeline.transformer.config.num_classes))
    for point in points:
        quality = measure(judge, train, draw_images(pipeline, point, indices.tolist()), labels)
        content = (json.dumps(asdict(quality)) + "\n").encode()
        storage.write_bytes(fs.LocalFileSystem(), str(folder / point.file), content)


def _measure_task(
    trial: Trial,
    folder: Path,
    points: Sequence[SamplingPoint],
    judge: Path,
    train: FeatureStatistics,
    num_samples: int,
) -> str:
    set_up_logging()
    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    measure_trial(folder / trial.name, points, load_judge(judge), train, num_samples, device)
    return trial.name


def measure_all(
    trials: Sequence[Trial],
    folder: Path,
    nfe: Sequence[int],
    judge: Path,
    train: FeatureStatistics,
    num_samples: int,
    *,
    use_gpu: bool,
) -> None:
    """Measures the missing points. Each trial is a Ray task with one thread, and one GPU if use_gpu."""
    points = {trial: missing_points(trial, folder, nfe) for trial in trials}
    missing = [trial for trial in trials if points[trial]]
    evaluations = {trial.name: num_samples * sum(point.nfe for point in points[trial]) for trial in missing}
    progress = Progress(logger, "sampled and measured:", "function evaluations", sum(evaluations.values()))
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=5)(_measure_task)
    reference = ray.put(train)
    pending = [task.remote(trial, folder, points[trial], judge, reference, num_samples) for trial in missing]
    done: list[str] = []
    for name in as_completed(pending):
        done.append(name)
        progress.update(sum(evaluations[name] for name in done), f"{len(done)} of {len(missing)} trials")
