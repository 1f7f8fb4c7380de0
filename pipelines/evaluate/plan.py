"""Which sets of images an evaluation measures."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines import storage
from pipelines.evaluate.chunks import Chunk, generated_chunks, image_file_chunks, sample_file_chunks
from pipelines.evaluate.inputs import Inputs
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.evaluate.sources import GeneratedSamples, ImageFiles

GRID_CLASSES = 10
GRID_COLUMNS = 8  # images per class
NUM_PIXEL_SAMPLES = 1000  # images kept of each set for the pixel distances

# Names of sets, as they appear in messages.
TRAINING_IMAGES = "training images"
REFERENCE_IMAGES = "reference images"
HELD_OUT_IMAGES = "held-out images"
RECONSTRUCTIONS = "reconstructions"
GRID = "grid"


def samples_set(number: int) -> str:
    """Name of the set of samples of the setting with this number."""
    return f"samples {number}"


def plan_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """The chunks of all sets."""
    chunks = _reference_chunks(job, inputs) + _held_out_chunks(job, inputs)
    if inputs.samples is None:
        return chunks + _generated_chunks(job, inputs)
    assert job.samples is not None
    num_features = job.num_precision_recall
    return chunks + sample_file_chunks(samples_set(0), job.samples, len(inputs.samples), num_features_kept=num_features)


def _reference_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """Training images to compute a reference from, or a reference's images if it has no features."""
    num_features, reference = job.num_precision_recall, inputs.reference
    if reference is None:
        assert inputs.train is not None
        return image_file_chunks(TRAINING_IMAGES, inputs.train, inputs.image_size, num_features_kept=num_features)
    is_readable = reference.has_images and storage.is_local(reference.location)
    if is_readable and reference.features is None and num_features:
        path = Path(reference.location)
        num_images = min(num_features, len(open_sample_file(path)))
        return sample_file_chunks(REFERENCE_IMAGES, path, num_images, num_features_kept=num_features)
    return []


def _held_out_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """Held-out images, and their reconstructions by the generator's autoencoder."""
    if inputs.held_out is None:
        return []
    real = image_file_chunks(
        HELD_OUT_IMAGES,
        inputs.held_out,
        inputs.image_size,
        shuffle=True,
        num_features_kept=job.num_precision_recall,
        num_images_kept=NUM_PIXEL_SAMPLES,
    )
    return real + [
        replace(chunk, set_name=RECONSTRUCTIONS, source=replace(chunk.source, reconstruct=True))
        for chunk in real
        if isinstance(chunk.source, ImageFiles)
    ]


def _generated_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """Samples of every setting, and the image grid."""
    assert inputs.generator is not None
    has_pixel_distances = inputs.held_out is not None and inputs.train is not None
    num_images = NUM_PIXEL_SAMPLES if has_pixel_distances else 0
    chunks: list[Chunk] = []
    for number, setting in enumerate(job.settings):
        chunks += generated_chunks(
            samples_set(number),
            setting,
            job.rule,
            job.num_samples,
            num_features_kept=job.num_precision_recall,
            num_images_kept=num_images if job.save_samples is None else job.num_samples,
        )
    indices = grid_indices(job, inputs.generator.num_classes)
    grid = GeneratedSamples(job.settings[0], job.rule, indices)
    return [*chunks, Chunk(GRID, 0, len(indices), grid, num_images_kept=len(indices))]


def grid_indices(job: EvaluateJob, num_classes: int) -> np.ndarray:
    """Sample indices of the image grid: rows of equal length, one for each of up to GRID_CLASSES evenly spread classes.

    Random labels may miss classes; the grid has only classes with samples.
    """
    labels = job.rule.labels_of(np.arange(job.num_samples), num_classes)
    classes, counts = np.unique(labels, return_counts=True)
    num_rows = min(len(classes), GRID_CLASSES)
    shown = np.arange(num_rows) * len(classes) // num_rows
    num_columns = min(GRID_COLUMNS, int(counts[shown].min()))
    return np.concatenate([np.flatnonzero(labels == label)[:num_columns] for label in classes[shown]])
