"""What the comparison measures of its trained generators: samples at several numbers of network calls, and times.

Every evaluation of the network is a call: Heun's method makes two of them in a step. The same seeds and classes are
drawn of every generator.
"""

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from pyarrow import fs

from meanflow_core.autoencoder import decode_latents
from meanflow_core.config import TrainingConfig
from meanflow_core.generator import load_pipeline
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import FeatureStatistics, frechet_distance
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.training import build_train_state, train_step
from pipelines import storage
from pipelines.command_line import set_up_logging
from pipelines.compare.trainings import Data, Trial, as_they_finish, methods
from pipelines.evaluate.judge import Judge, load_judge
from pipelines.evaluate.samples import SampleRule
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.progress import Progress
from pipelines.train.batches import BatchSource

logger = logging.getLogger(__name__)

BATCH_SIZE = 50
TIMED_IMAGES = 10
RULE = SampleRule(base_seed=0, labels="balanced")


@dataclass(frozen=True, kw_only=True)
class Point:
    """How to sample."""

    solver: Literal["euler", "heun"]
    """Euler's steps are MeanFlow's too: a step along an average velocity."""
    calls: int
    """Evaluations of the network per image."""

    @property
    def num_steps(self) -> int:
        """Steps that make so many calls."""
        return self.calls // 2 if self.solver == "heun" else self.calls

    @property
    def file(self) -> str:
        """Where a run's folder keeps what was measured."""
        return f"measured/{self.solver}-{self.calls}-calls.json"


def points_of(config: TrainingConfig, calls: Sequence[int]) -> list[Point]:
    """How a method is sampled at the given numbers of calls: Heun's method for flow matching too, where they are even."""
    points = [Point(solver="euler", calls=count) for count in calls]
    if config.loss.is_flow_matching:
        points += [Point(solver="heun", calls=count) for count in calls if count % 2 == 0]
    return points


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A set of images, measured."""

    frechet: float
    """Fréchet distance to the training images in the judge's features."""
    accuracy: float
    """Share whose class the judge sees."""


def measure(judge: Judge, train: FeatureStatistics, images: torch.Tensor, labels: torch.Tensor) -> Quality:
    """Measures uint8 images (N, H, W, 3) that ought to be of classes (N,). train: of the training images' features."""
    seen = judge.look_at(images)
    return Quality(
        frechet=frechet_distance(FeatureStatistics.of(seen.features), train),
        accuracy=float((seen.predictions == labels).double().mean()),
    )


def draw_images(pipeline: MeanFlowPipeline, point: Point, indices: Sequence[int]) -> torch.Tensor:
    """Samples by their indices, uint8 (N, H, W, 3) on the CPU: sample i of class i mod num_classes, from seed i."""
    rows = np.asarray(indices)
    labels = RULE.labels_of(rows, pipeline.transformer.config.num_classes).tolist()
    seeds = RULE.seeds_of(rows)
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


def read_quality(folder: Path, point: Point) -> Quality | None:
    """What was measured of a run already; None where nothing was."""
    path = folder / point.file
    return Quality(**json.loads(path.read_text())) if path.is_file() else None


def is_measured(run: Trial, runs_folder: Path, calls: Sequence[int]) -> bool:
    """Whether all that will be asked of a run is known."""
    return all(read_quality(runs_folder / run.name, point) is not None for point in points_of(run.config, calls))


def measure_run(
    folder: Path,
    points: Sequence[Point],
    judge: Judge,
    train: FeatureStatistics,
    num_samples: int,
    device: torch.device | None = None,
) -> None:
    """Measures a trained run's generator at those points that its folder does not know yet, in this process."""
    missing = [point for point in points if read_quality(folder, point) is None]
    if not missing:
        return
    pipeline = load_pipeline(folder / "generator", device or torch.device("cpu"))
    indices = np.arange(num_samples)
    labels = torch.from_numpy(RULE.labels_of(indices, pipeline.transformer.config.num_classes))
    for point in missing:
        quality = measure(judge, train, draw_images(pipeline, point, indices.tolist()), labels)
        content = (json.dumps(asdict(quality)) + "\n").encode()
        storage.write_bytes(fs.LocalFileSystem(), str(folder / point.file), content)


def _measure_remotely(
    run: Trial, runs_folder: Path, points: Sequence[Point], judge: Path, train: FeatureStatistics, num_samples: int
) -> str:
    set_up_logging()
    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    measure_run(runs_folder / run.name, points, load_judge(judge), train, num_samples, device)
    return run.name


def measure_all(
    runs: Sequence[Trial],
    runs_folder: Path,
    calls: Sequence[int],
    judge: Path,
    train: FeatureStatistics,
    num_samples: int,
    *,
    use_gpu: bool,
) -> None:
    """Measures what is not measured yet, each run a task of Ray with a thread of its own, and a GPU where asked."""
    points = {
        run: [
            point
            for point in points_of(run.config, calls)
            if read_quality(runs_folder / run.name, point) is None
        ]
        for run in runs
    }  # fmt: skip
    missing = [run for run in runs if points[run]]
    network_calls = {run.name: num_samples * sum(point.calls for point in points[run]) for run in missing}
    progress = Progress(logger, "sampled and measured: made", "network calls", sum(network_calls.values()))
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=5)(_measure_remotely)
    reference = ray.put(train)
    waiting = [task.remote(run, runs_folder, points[run], judge, reference, num_samples) for run in missing]
    done: list[str] = []
    for name in as_they_finish(waiting):
        done.append(name)
        progress.update(sum(network_calls[name] for name in done), f"{len(done)} of {len(missing)} runs")


def interleaved_medians(
    actions: Mapping[str, Callable[[], object]], device: torch.device, num_rounds: int
) -> dict[str, float]:
    """{name: median seconds} of actions that take turns, A B C A B C, after one turn that is not timed.

    Turns, because a machine's speed drifts: each action meets the same weather.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(num_rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_training(names: Sequence[str], data: Data, device: torch.device, num_rounds: int) -> dict[str, float]:
    """{method: seconds of one training step}, all on the same batch of the data."""
    dataset = open_latents(data.latents, data.cache_dir)
    normalization = LatentNormalization.from_vae_config(open_autoencoder(data.latents).config)

    def step_of(config: TrainingConfig) -> Callable[[], object]:
        state = build_train_state(config, **dataset.manifest.network_sizes, device=device)
        batches = BatchSource(dataset, config, rank=0, world_size=1, device=device).batches(0)
        return lambda: train_step(state, state.network, batches, normalization, config)

    configs = {name: method.config for name, method in methods(1000).items() if name in names}
    return interleaved_medians({name: step_of(config) for name, config in configs.items()}, device, num_rounds)


def time_sampling(
    generators: dict[str, Path], calls: Sequence[int], device: torch.device, num_rounds: int
) -> tuple[dict[int, dict[str, float]], float]:
    """{calls: {method: milliseconds per image}} of network and decoder, and those of the decoder alone.

    generators: {method: folder}. Images are drawn TIMED_IMAGES at a time.
    """
    pipelines = {name: load_pipeline(folder, device) for name, folder in generators.items()}
    indices = range(TIMED_IMAGES)

    def drawing(pipeline: MeanFlowPipeline, point: Point) -> Callable[[], object]:
        return lambda: draw_images(pipeline, point, indices)

    per_image = 1000.0 / TIMED_IMAGES
    found = {
        count: interleaved_medians(
            {name: drawing(pipeline, Point(solver="euler", calls=count)) for name, pipeline in pipelines.items()},
            device,
            num_rounds,
        )
        for count in calls
    }
    first = next(iter(pipelines.values()))
    latents = torch.randn(TIMED_IMAGES, *first.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    decoding = {"decoder": lambda: decode_latents(first.vae, latents).cpu()}
    decoder = interleaved_medians(decoding, device, num_rounds)["decoder"]
    milliseconds = {
        count: {name: per_image * seconds for name, seconds in by_method.items()}
        for count, by_method in found.items()
    }  # fmt: skip
    return milliseconds, per_image * decoder


def hardware(device: torch.device) -> dict[str, Any]:
    """What times were taken on."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "num_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
