"""Runs an evaluation: open the inputs, measure every set of images, build the report, write and log it."""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image

from meanflow_core.grids import image_grid
from pipelines import storage
from pipelines.cluster import map_on_cluster
from pipelines.errors import InputError
from pipelines.evaluate.chunks import num_kept_between
from pipelines.evaluate.inputs import Inputs, open_inputs
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.make_reference import reference_bytes
from pipelines.evaluate.measuring import WorkerConfig
from pipelines.evaluate.mlflow_log import log_report
from pipelines.evaluate.nearest import nearest_training_images, plot_nearest
from pipelines.evaluate.plan import (
    GRID,
    GRID_COLUMNS,
    NUM_PIXEL_SAMPLES,
    REFERENCE_IMAGES,
    TRAINING_IMAGES,
    has_neighbours,
    plan_chunks,
    samples_set,
)
from pipelines.evaluate.plots import plot_guidance, plot_quality
from pipelines.evaluate.promotion import open_promotion, promote_if_better
from pipelines.evaluate.real_images import read_evenly
from pipelines.evaluate.report import build_report
from pipelines.evaluate.sample_files import SampleFileWriter
from pipelines.evaluate.sums import SetSums
from pipelines.evaluate.table import report_table
from pipelines.evaluate.workers import Workers, measure_sets, start_cluster
from pipelines.extractors.opening import absolute_extractor
from pipelines.extractors.reference import Reference, read_reference, reference_protocol
from pipelines.progress import format_seconds
from pipelines.tracking.registry import REGISTRY_SCHEMES

logger = logging.getLogger(__name__)

NUM_PIXEL_TRAIN = 10_000  # training images to search for nearest neighbours


def evaluate(job: EvaluateJob, *, logs_to_mlflow: bool = True) -> dict[str, Any]:
    """Measures, writes the report's files, logs them to MLflow, and returns the report.

    Raises InputError for invalid input.
    """
    job = with_absolute_locations(job)
    promotion = None
    if job.promote:
        promotion = open_promotion(job, job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        if promotion is not None:
            job = replace(job, model=promotion.version.uri)  # the alias may move during the evaluation
    inputs = open_inputs(job)
    measured = _measure(job, inputs)
    job.output.mkdir(parents=True, exist_ok=True)
    reference = _complete_reference(job, inputs, measured.sets)
    report = build_report(job, inputs, reference, measured.sets, _train_pixels(inputs)) | measured.statistics
    for name, count in report["num_unreadable"].items():
        logger.warning("skipped %d unreadable %s", count, name)
    files = _write_report(job, inputs, report, measured.sets)
    if logs_to_mlflow:
        log_report(job, inputs.generator, report, files)
    if promotion is not None:
        promote_if_better(promotion, report)
    return report


def with_absolute_locations(job: EvaluateJob) -> EvaluateJob:
    """Returns the job with absolute paths, because workers run in other working directories.

    Raises InputError if --output or --save-samples is a URI.
    """
    for option, folder in (("--output", job.output), ("--save-samples", job.save_samples)):
        if folder is not None and ":/" in str(folder):  # a Path turns s3://bucket into s3:/bucket
            raise InputError(
                f"{option} must be a folder on a mounted disk, but got {folder}; MLflow can store a copy of the report"
            )
    is_folder = job.model is not None and not job.model.startswith(REGISTRY_SCHEMES)
    save = job.save_samples
    return replace(
        job,
        model=_absolute(job.model) if is_folder else job.model,
        output=Path(storage.output_location(str(job.output), "--output")),
        samples=None if job.samples is None else job.samples.absolute(),
        save_samples=None if save is None else Path(storage.output_location(str(save), "--save-samples")),
        extractor=absolute_extractor(job.extractor),
        extractor_weights=None if job.extractor_weights is None else job.extractor_weights.absolute(),
        reference=_absolute(job.reference),
        train_images=_absolute(job.train_images),
        held_out_images=_absolute(job.held_out_images),
    )


def _absolute(location: str | None) -> str | None:
    return None if location is None else storage.absolute(location)


@dataclass(frozen=True)
class Measured:
    """The sums of every set, and the report's entries on speed, hardware and unreadable images."""

    sets: dict[str, SetSums]
    statistics: dict[str, Any]


def _measure(job: EvaluateJob, inputs: Inputs) -> Measured:
    """Generates or reads the images of all sets on the cluster, and measures them."""
    chunks = plan_chunks(job, inputs)
    workers = start_cluster(job)
    tracking_uri = job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    config = WorkerConfig(options=job, model=job.model, tracking_uri=tracking_uri)
    saver = SampleSaver(job, inputs.image_size)
    started = time.monotonic()
    sets = measure_sets(chunks, config, workers, on_chunk=saver)
    seconds = time.monotonic() - started
    saver.close()
    for name, sums in sets.items():
        if name != GRID and sums.num_images < 3:
            raise InputError(
                f"an evaluation requires at least 3 readable {name}, but got {sums.num_images}; "
                f"{sums.num_unreadable} could not be read"
            )
    num_images = sum(sums.num_images for sums in sets.values())
    logger.info("measured %d images in %s; computing the metrics", num_images, format_seconds(seconds))
    return Measured(
        sets,
        {
            "images_per_second": num_images / seconds,
            "machine": {"workers": workers.num_workers, "device": _device_name(workers)},
            "num_unreadable": {name: sums.num_unreadable for name, sums in sets.items() if sums.num_unreadable},
        },
    )


class SampleSaver:
    """Writes all samples to files, and keeps only the images for the pixel distances in memory."""

    def __init__(self, job: EvaluateJob, image_size: int) -> None:
        self._files: dict[str, SampleFileWriter] = {}
        if job.save_samples is not None:
            for number, setting in enumerate(job.settings):
                path = job.save_samples / f"samples-{setting.slug}.npz"
                self._files[samples_set(number)] = SampleFileWriter(path, job.num_samples, image_size)

    def __call__(self, sums: SetSums) -> None:
        """Writes the images of a chunk, then removes those not needed for the pixel distances."""
        file = self._files.get(sums.set_name)
        if file is None:
            return
        images, start = torch.cat(sums.images), file.num_written
        file.write(images.numpy())
        num_kept = num_kept_between(NUM_PIXEL_SAMPLES, file.num_samples, start, file.num_written)
        sums.images = [images[:num_kept].clone()]
        sums.labels = [torch.cat(sums.labels)[:num_kept].clone()]

    def close(self) -> None:
        """Completes the files and renames them to their final names."""
        for file in self._files.values():
            file.close()


def _device_name(workers: Workers) -> str:
    if not workers.use_gpu:
        return f"CPU ({platform.processor() or platform.machine()})"
    name = ray.remote(num_gpus=1)(lambda: torch.cuda.get_device_name())
    return str(ray.get(name.remote()))


def _complete_reference(job: EvaluateJob, inputs: Inputs, sets: Mapping[str, SetSums]) -> Reference:
    """Returns the given reference, with features if they were computed from its images.

    Without one, computes a reference from the training images and writes it next to the report.
    """
    if inputs.reference is not None:
        if REFERENCE_IMAGES not in sets:
            return inputs.reference
        return replace(inputs.reference, features=torch.cat(sets[REFERENCE_IMAGES].features))
    assert inputs.train is not None
    sums = sets[TRAINING_IMAGES]
    source = {"images": str(job.train_images), "sha256": inputs.train[1].sha256}
    protocol = reference_protocol(inputs.extractor.identity, source, inputs.image_size, sums.num_images)
    location = str(job.output / "reference.npz")
    content = reference_bytes(sums, protocol, inputs.train[2].class_names)
    storage.write_bytes(*storage.open_storage(location), content)
    return read_reference(location)


def _train_pixels(inputs: Inputs) -> torch.Tensor | None:
    """Reads training images for the pixel distances on the cluster.

    Returns None without training images, held-out images or a generator.
    """
    if inputs.train is None or inputs.held_out is None or inputs.generator is None:
        return None
    return read_evenly(inputs.train, inputs.image_size, NUM_PIXEL_TRAIN, map_on_cluster)[0]


def _write_report(job: EvaluateJob, inputs: Inputs, report: dict[str, Any], sets: Mapping[str, SetSums]) -> list[Path]:
    """Writes the report's files and returns their paths."""
    files = [job.output / "samples.png"]
    if inputs.samples is not None:
        images, num_columns = inputs.samples[: GRID_COLUMNS**2], GRID_COLUMNS
    else:
        images = torch.cat(sets[GRID].images).numpy()
        num_columns = len(images) // len(torch.cat(sets[GRID].labels).unique())
    Image.fromarray(image_grid(images, num_columns)).save(files[0])
    if has_neighbours(job, inputs):
        files.append(job.output / "nearest.png")
        plot_nearest(nearest_training_images(job, inputs, sets), job.settings[0].title, files[-1])
    if inputs.generator is not None:
        files.append(job.output / "quality_against_steps.png")
        plot_quality(report, files[-1])
        if len(job.guidance_scales) > 1:
            files.append(job.output / "quality_against_guidance.png")
            plot_guidance(report, files[-1])
    for name, content in (("table.md", report_table(report)), ("report.json", json.dumps(report, indent=2) + "\n")):
        files.append(job.output / name)
        files[-1].write_text(content)
    return files
