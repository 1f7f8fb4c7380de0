"""Trains a judge on an image source, and writes its folder."""

import logging
import time
from dataclasses import asdict, dataclass

import torch

from pipelines import storage
from pipelines.errors import InputError
from pipelines.images.decoding import read_pixels
from pipelines.images.index import ImageIndex
from pipelines.images.sources import find_images
from pipelines.judge.job import JudgeFit, JudgeJob
from pipelines.judge.network import Judge
from pipelines.judge.training import fit_judge, held_out_accuracy
from pipelines.progress import format_seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    judge: Judge
    held_out_accuracy: float
    """Fraction of held-out images that it classifies correctly."""
    num_images: int
    """Training images that could be read."""
    num_held_out: int
    seconds: float
    """Time of the training, without reading the images."""


def train_judge(job: JudgeJob) -> Trained:
    """Trains a judge, and writes its weights and its model card to --output.

    Raises InputError for images of fewer than two classes, for held-out images of other classes, and for images that take
    more memory than the job allows.
    """
    if "://" in str(job.output):
        raise InputError(f"--output must be a folder on a disk, but got {job.output}")
    output = storage.output_location(str(job.output), "--output")
    images, held_out = find_images(job.images), find_images(job.held_out_images)
    class_names = _common_classes(job, images[2], held_out[2])
    require_memory(job, len(images[2]), len(held_out[2]))
    pixels, labels = (torch.from_numpy(array) for array in read_pixels(*images, job.image_size, job.num_images))
    held_out_pixels, held_out_labels = (torch.from_numpy(array) for array in read_pixels(*held_out, job.image_size))
    torch.manual_seed(job.seed)
    began = time.monotonic()
    judge = fit_judge(Judge(class_names=class_names, image_size=job.image_size), pixels, labels, job)
    seconds = time.monotonic() - began
    accuracy = held_out_accuracy(judge, held_out_pixels, held_out_labels)
    trained = Trained(judge, accuracy, len(pixels), len(held_out_pixels), seconds)
    judge.save_pretrained(output)
    (job.output / "README.md").write_text(model_card(job, trained))
    logger.info(
        "held-out accuracy %.4f over %d images, after %s; wrote %s",
        accuracy, trained.num_held_out, format_seconds(seconds), job.output,
    )  # fmt: skip
    return trained


def _common_classes(job: JudgeJob, images: ImageIndex, held_out: ImageIndex) -> tuple[str, ...]:
    if len(images.class_names) < 2:
        raise InputError(
            f"a judge requires images of at least 2 classes, but {job.images} has {', '.join(images.class_names)}; give a "
            f"folder with one sub-folder per class"
        )
    if held_out.class_names != images.class_names:
        raise InputError(
            f"{job.held_out_images} must have exactly the classes of {job.images}, {', '.join(images.class_names)}, but has "
            f"{', '.join(held_out.class_names)}"
        )
    return tuple(images.class_names)


def require_memory(job: JudgeJob, num_found: int, num_held_out: int) -> None:
    """Raises InputError if the pixels of all images take more than `max_image_bytes`."""
    num_images = min(num_found, job.num_images or num_found) + num_held_out
    needed = num_images * job.image_size**2 * 3
    if needed > job.max_image_bytes:
        raise InputError(
            f"{num_images} images of {job.image_size}x{job.image_size} pixels take {needed:,} bytes of memory, but "
            f"--max-image-bytes is {job.max_image_bytes:,}; choose a smaller --image-size, fewer --num-images, or a larger "
            f"--max-image-bytes"
        )


def model_card(job: JudgeJob, trained: Trained) -> str:
    """The README.md stored with the weights."""
    error = (trained.held_out_accuracy * (1 - trained.held_out_accuracy) / trained.num_held_out) ** 0.5
    num_parameters = sum(parameter.numel() for parameter in trained.judge.parameters())
    fit = {name: value for name, value in asdict(job).items() if name in asdict(JudgeFit())}
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fit.items())
    return f"""# A judge of {len(trained.judge.config.class_names)} classes

A small classifier of {job.image_size}x{job.image_size} images; {num_parameters:,} parameters. Its 64 features give a
Fréchet distance, which is not FID, and its predictions the class accuracy of a generator's samples.
Use it as `meanflow evaluate --extractor FOLDER`.

| | |
|---|---|
| classes | {", ".join(trained.judge.config.class_names)} |
| trained on | {trained.num_images:,} images of `{storage.redact(job.images)}` |
| settings | {settings} |
| time | {format_seconds(trained.seconds)} with {torch.get_num_threads()} threads |
| held-out accuracy | {trained.held_out_accuracy:.4f} ± {error:.4f} over {trained.num_held_out:,} images |
| held-out images | `{storage.redact(job.held_out_images)}` |
| licence | that of the images, if it extends to weights; the code is Apache-2.0 |
"""
