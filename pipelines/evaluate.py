"""Stage 3: what a generator is worth: samples at several numbers of steps, drawn on every device, and measured.

    python -m pipelines.evaluate --model models:/meanflow-demo@champion --tracking-uri sqlite:////runs/mlflow.db \\
        --train-images demo/train --held-out-images demo/val --output report

The measures are a judge's (pipelines/judge.py), beside their floor: what held-out real images score. The Frechet
distance is in the judge's features and is not FID. Writes report.json, table.md, samples.png and
quality_against_steps.png, and logs them to the MLflow run that trained the model.
"""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image

from meanflow_core.autoencoder import decode_latents, encode_moments
from meanflow_core.generator import load_pipeline
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import (
    FeatureStatistics,
    frechet_distance,
    mean_within_class_distance,
    nearest_distances,
    peak_signal_to_noise,
)
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage, tracking
from pipelines.command import InputError, choose_gpus, num_gpus, parse_command_line, run_command, start_ray
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.grids import image_grid
from pipelines.image_reading import read_pixels
from pipelines.image_sources import find_images
from pipelines.judge import Judge, Judgement, load_judge
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

GRID_COLUMNS = 8
REPORT_FILES = ("report.json", "table.md", "samples.png", "quality_against_steps.png")


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Sample a generator and measure it."""

    model: str
    """Generator: a folder, models:/name@alias or runs:/id/name."""
    train_images: str
    """Folder of class folders: the real images that the generator learnt from."""
    held_out_images: str
    """Folder of class folders: real images that it did not see."""
    output: Path
    """Folder for the report."""
    tracking_uri: str | None = None
    """MLflow address; MLFLOW_TRACKING_URI unless given. Without either, nothing is logged there."""
    judge: Path = SHIPPED_JUDGE
    """Folder of the classifier that measures; the demo's unless given."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of network calls to sample with."""
    num_samples: int = 1000
    """Samples per number of steps, sample i of class i mod num_classes."""
    seed: int = 0
    """Base seed: sample i's noise is that of seed * 2^32 + i, whatever the number of devices."""
    batch_size: int = 50
    """Samples per call."""
    num_samplers: int | None = None
    """Processes that sample; one per GPU, or one on a machine without."""
    use_gpu: bool | None = None
    """Sample on GPUs; where the cluster has some, unless said."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must name numbers of at least 1, but got {self.steps}")
        if self.num_samples < 2 or self.batch_size < 1:
            raise ValueError(
                f"num_samples must be at least 2 and batch_size 1, but got {self.num_samples}, {self.batch_size}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, 2^31 - 1], but got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One set of images measured."""

    accuracy: float
    """Share whose class the judge sees."""
    frechet: float
    """Frechet distance to the training images in the judge's features."""
    diversity: float
    """Mean pairwise pixel distance within a class, over that of held-out images."""
    nearest_train_ratio: float
    """Median pixel distance to the nearest training image, over that of held-out images; far below 1 is copying."""


class Reference:
    """The real images, and what the measures need of them."""

    def __init__(
        self, judge: Judge, train: torch.Tensor, held_out: torch.Tensor, held_out_labels: torch.Tensor
    ) -> None:
        self._judge = judge
        self._train = train.flatten(1).float()
        self._train_statistics = FeatureStatistics.of(judge.look_at(train).features)
        self._held_out_diversity = mean_within_class_distance(held_out, held_out_labels)
        self._held_out_nearest = float(nearest_distances(held_out.flatten(1), self._train).median())

    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> Quality:
        """Measures uint8 images (N, H, W, 3) that ought to be of classes (N,)."""
        seen: Judgement = self._judge.look_at(images)
        nearest = float(nearest_distances(images.flatten(1), self._train).median())
        return Quality(
            accuracy=float((seen.predictions == labels).double().mean()),
            frechet=frechet_distance(FeatureStatistics.of(seen.features), self._train_statistics),
            diversity=mean_within_class_distance(images, labels) / self._held_out_diversity,
            nearest_train_ratio=nearest / self._held_out_nearest,
        )


class Sampler:
    """Draws samples by their indices on one device. A plain callable: it needs no cluster."""

    def __init__(self, model: str, tracking_uri: str | None, base_seed: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._pipeline = load_pipeline(
            tracking.fetch_generator(model, tracking_uri), "cuda" if torch.cuda.is_available() else "cpu"
        )
        self._base_seed = base_seed

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"index", "steps"}, each (B,), one number of steps -> also "image" uint8 (B, H, W, 3) and "seconds" each."""
        began = time.perf_counter()
        indices, steps = batch["index"], int(batch["steps"][0])
        assert (batch["steps"] == steps).all(), "a block must hold one number of steps"
        labels = sample_labels(indices, self._pipeline.transformer.config.num_classes)
        seeds = [self._base_seed * 2**32 + int(index) for index in indices]
        images = self._pipeline.images_from_seeds(labels.tolist(), seeds, steps).cpu().numpy()
        seconds = (time.perf_counter() - began) / len(indices)
        return {**batch, "image": images, "seconds": np.full(len(indices), seconds)}


def sample_labels(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """The balanced labels of sample indices: i mod num_classes."""
    return indices % num_classes


@dataclass(frozen=True)
class Samples:
    """All samples at one number of steps."""

    images: torch.Tensor
    """(N, H, W, 3) uint8, by sample index."""
    seconds_per_image: float
    """Of one sampler: network and decoder."""


def draw_samples(job: EvaluateJob, image_size: int) -> dict[int, Samples]:
    """The samples of every number of steps, drawn on every device."""
    num_samplers = job.num_samplers or max(1, num_gpus())
    use_gpu = choose_gpus(job.use_gpu, num_samplers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    chunks = [(steps, start) for steps in job.steps for start in range(0, job.num_samples, job.batch_size)]
    rows = [
        pa.table({"index": index, "steps": np.full(len(index), steps)})
        for steps, start in chunks
        for index in [np.arange(start, min(start + job.batch_size, job.num_samples))]
    ]
    samples = ray.data.from_arrow(rows).map_batches(  # a table, a block, a call of the sampler
        Sampler,
        batch_size=None,
        fn_constructor_kwargs={
            "model": job.model,
            "tracking_uri": job.tracking_uri,
            "base_seed": job.seed,
            "num_threads": max(1, (os.cpu_count() or 1) // num_samplers),
        },
        compute=ray.data.ActorPoolStrategy(size=num_samplers),
        num_gpus=1 if use_gpu else 0,
        num_cpus=0 if use_gpu else 1,
    )
    images = {steps: np.empty((job.num_samples, image_size, image_size, 3), np.uint8) for steps in job.steps}
    seconds = dict.fromkeys(job.steps, 0.0)
    progress, done = Progress(logger, "sampled", "images", job.num_samples * len(job.steps)), 0
    for batch in samples.iter_batches(batch_size=None):
        steps = int(batch["steps"][0])
        images[steps][batch["index"]] = batch["image"]  # blocks come in any order
        seconds[steps] += float(batch["seconds"].sum())
        done += len(batch["index"])
        progress.update(done, f"now at {steps} step{'s' * (steps > 1)}")
    assert done == job.num_samples * len(job.steps)
    return {steps: Samples(torch.from_numpy(images[steps]), seconds[steps] / job.num_samples) for steps in job.steps}


def reconstruct(pipeline: MeanFlowPipeline, images: torch.Tensor, batch_size: int = 100) -> torch.Tensor:
    """What the autoencoder alone makes of uint8 images (N, H, W, 3): the best that a generator can look like."""
    normalization = LatentNormalization.from_vae_config(pipeline.vae.config)
    decoded = []
    for batch in images.split(batch_size):
        mean, _ = encode_moments(pipeline.vae, batch).chunk(2, dim=1)
        decoded.append(decode_latents(pipeline.vae, normalization.normalize(mean)))
    return torch.cat(decoded)


def table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = [
        f"{report['num_samples']} samples of `{report['model']}`; distances to {report['num_train_images']} training images.",
        "The Fréchet distance is in the features of the demo's judge; it is not FID.",
        "",
        "| images | accuracy | Fréchet distance | diversity | nearest-train ratio |",
        "|---|---|---|---|---|",
    ]
    rows = [
        ("held-out real (the floor)", report["held_out"]),
        ("autoencoder's reconstructions", report["reconstruction"]),
    ]
    rows += [(f"{entry['steps']}-step samples", entry) for entry in report["samples"]]
    for name, entry in rows:
        lines.append(
            f"| {name} | {entry['accuracy']:.3f} | {entry['frechet']:.3f} | {entry['diversity']:.3f} "
            f"| {entry['nearest_train_ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict, path: Path) -> None:
    """Fréchet distance and accuracy against the number of network calls, with what real images score."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry["steps"] for entry in report["samples"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(
        axes, ("frechet", "accuracy"), ("Fréchet distance (the judge's; not FID)", "class accuracy"), strict=True
    ):
        axis.plot(steps, [entry[key] for entry in report["samples"]], "o-", label="samples")
        axis.axhline(report["reconstruction"][key], ls=":", color="tab:orange", label="autoencoder's reconstructions")
        axis.axhline(report["held_out"][key], ls="--", color="tab:green", label="held-out real images")
        axis.set(title=title, xlabel="network calls per image", xscale="log", xticks=steps)
        axis.set_xticks(steps, [str(count) for count in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0.0, 1.03)
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def read_real_images(location: str, class_names: list[str], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real images uint8 (N, size, size, 3) and their classes (N,).

    Raises InputError where the folder's classes are not the generator's, or a class has fewer than two images.
    """
    filesystem, listing, index = find_images(location)
    if index.class_names != class_names:
        raise InputError(
            f"the classes in {location} are {', '.join(index.class_names)}, but the generator's are "
            f"{', '.join(class_names)}; every class needs images"
        )
    pixels, labels = (torch.from_numpy(array) for array in read_pixels(filesystem, listing, index, size))
    counts = torch.bincount(labels, minlength=len(class_names))
    if int(counts.min()) < 2:
        few = class_names[int(counts.argmin())]
        raise InputError(f"{location} has {int(counts.min())} readable images of class {few}, but 2 are needed of each")
    return pixels, labels


def evaluate(job: EvaluateJob) -> dict:
    """Measures, writes the report's files, logs them, and returns the report. Raises InputError for unfit input."""
    model = job.model if job.model.startswith(tracking.REGISTRY_SCHEMES) else storage.absolute(job.model)
    output = Path(storage.output_location(str(job.output), "--output"))
    job = replace(job, model=model, output=output)
    run = tracking.find_run(job.model, job.tracking_uri)
    job = replace(job, tracking_uri=job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
    judge = load_judge(job.judge)
    folder = tracking.fetch_generator(job.model, job.tracking_uri)
    pipeline = load_pipeline(folder)
    names = list(pipeline.class_names.values())
    if names != list(judge.config.class_names):
        raise InputError(
            f"the judge in {job.judge} knows the classes {', '.join(judge.config.class_names)}, but the generator's are "
            f"{', '.join(names)}; name a --judge that was trained on them"
        )
    if job.num_samples < 2 * len(names):
        raise InputError(
            f"--num-samples must be at least 2 for each of {len(names)} classes, but got {job.num_samples}"
        )
    size = judge.config.image_size
    train, _ = read_real_images(job.train_images, names, size)
    held_out, held_out_labels = read_real_images(job.held_out_images, names, size)
    logger.info("read %d training and %d held-out images", len(train), len(held_out))

    start_ray(needed_cpus=(job.num_samplers or 1) + 1)
    drawn = draw_samples(job, size)
    labels = torch.from_numpy(sample_labels(np.arange(job.num_samples), len(names)))
    logger.info("measuring")
    reference = Reference(judge, train, held_out, held_out_labels)
    reconstructions = reconstruct(pipeline, held_out)
    report = {
        "model": job.model,
        "num_samples": job.num_samples,
        "num_train_images": len(train),
        "seed": job.seed,
        "autoencoder_psnr": peak_signal_to_noise(reconstructions, held_out),
        "held_out": asdict(reference.measure(held_out, held_out_labels)),
        "reconstruction": asdict(reference.measure(reconstructions, held_out_labels)),
        "samples": [
            {
                "steps": steps,
                **asdict(reference.measure(samples.images, labels)),
                "seconds_per_image": samples.seconds_per_image,
            }
            for steps, samples in drawn.items()
        ],
    }
    first_images = drawn[min(job.steps)].images
    columns = min(GRID_COLUMNS, job.num_samples // len(names)) or 1
    by_class = [
        index for label in range(len(names)) for index in (labels == label).nonzero().flatten()[:columns].tolist()
    ]
    job.output.mkdir(parents=True, exist_ok=True)
    grid = image_grid(first_images[by_class].numpy(), columns)
    Image.fromarray(grid).save(job.output / "samples.png")
    plot(report, job.output / "quality_against_steps.png")
    (job.output / "table.md").write_text(table(report))
    (job.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _log(job, run, report)
    return report


def _log(job: EvaluateJob, run: tracking.Run | None, report: dict) -> None:
    if run is None and job.tracking_uri is not None:
        run = tracking.find_run(job.model, job.tracking_uri)
    if run is None and job.tracking_uri is None:
        logger.info("no MLflow address given, so the report is in %s alone", job.output)
        return
    trained_here = run is not None
    if run is None:
        parameters = {"model": job.model, "num_samples": job.num_samples, "seed": job.seed}
        run = tracking.Run.begin(str(job.tracking_uri), "meanflow-ray", "evaluate", parameters)
    keys = ("accuracy", "frechet", "diversity", "nearest_train_ratio")
    for entry in report["samples"]:  # the number of steps is the metric's step: MLflow draws the curve
        run.log_metrics({f"evaluate/{key}": entry[key] for key in keys}, entry["steps"])
    for name in REPORT_FILES:
        run.log_file(job.output / name, "evaluate")
    run.flush()
    if not trained_here:
        run.end("FINISHED")
    logger.info("logged to MLflow run %s at %s", run.run_id, run.tracking_uri)


def main() -> None:
    """The command."""
    job = parse_command_line(EvaluateJob, __doc__)
    report = evaluate(job)
    print(table(report), end="")
    print(f"report: {job.output}")


if __name__ == "__main__":
    run_command(main)
