"""Plans which sets of images an evaluation measures."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines import storage
from pipelines.evaluate.chunks import Chunk, Kept, generated_chunks, image_file_chunks, sample_file_chunks
from pipelines.evaluate.inputs import Inputs
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.real_images import ImageSource
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.evaluate.samples import SampleRule
from pipelines.evaluate.sources import GeneratedSamples, ImageFiles
from pipelines.images.sampling import sample_images

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
    """Name of the set of samples drawn with setting `number`."""
    return f"samples of setting {number + 1}"


def plan_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """Returns the chunks of all sets."""
    chunks = _reference_chunks(job, inputs) + _neighbour_chunks(job, inputs) + _held_out_chunks(job, inputs)
    if inputs.samples is None:
        return chunks + _generated_chunks(job, inputs)
    assert job.samples is not None
    kept = Kept(features=job.num_precision_recall)
    return chunks + sample_file_chunks(samples_set(0), job.samples, len(inputs.samples), kept)


def _reference_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """The training images if no reference is given, or the reference's own images if it has no features."""
    reference, kept = inputs.reference, Kept(features=job.num_precision_recall)
    if reference is None:
        assert inputs.train is not None
        return image_file_chunks(TRAINING_IMAGES, inputs.train, inputs.image_size, kept)
    is_readable = reference.has_images and storage.is_local(reference.location)
    if is_readable and reference.features is None and kept.features:
        path = Path(reference.location)
        return sample_file_chunks(REFERENCE_IMAGES, path, min(kept.features, len(open_sample_file(path))), kept)
    return []


def has_neighbours(job: EvaluateJob, inputs: Inputs) -> bool:
    """Whether the nearest training images of the samples are searched in feature space."""
    return inputs.generator is not None and inputs.train is not None and job.num_precision_recall > 0


def neighbour_source(job: EvaluateJob, inputs: Inputs) -> ImageSource:
    """The training images whose features are measured: all for a new reference, else those to search for neighbours."""
    assert inputs.train is not None
    if inputs.reference is None:
        return inputs.train
    filesystem, listing, index = inputs.train
    return filesystem, listing, sample_images(index, job.num_precision_recall)


def _neighbour_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """The training images to search for neighbours, unless they are measured for the reference anyway."""
    if inputs.reference is None or not has_neighbours(job, inputs):
        return []
    kept = Kept(features=job.num_precision_recall)
    return image_file_chunks(TRAINING_IMAGES, neighbour_source(job, inputs), inputs.image_size, kept)


def _held_out_chunks(job: EvaluateJob, inputs: Inputs) -> list[Chunk]:
    """Held-out images, and their reconstructions by the generator's autoencoder."""
    if inputs.held_out is None:
        return []
    kept = Kept(job.num_precision_recall, NUM_PIXEL_SAMPLES)
    real = image_file_chunks(HELD_OUT_IMAGES, inputs.held_out, inputs.image_size, kept, shuffle=True)
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
    kept = Kept(job.num_precision_recall, num_images if job.save_samples is None else job.num_samples)
    rule = SampleRule(job.seed, job.labels, inputs.class_counts if job.labels == "training" else ())
    chunks: list[Chunk] = []
    for number, setting in enumerate(job.settings):
        chunks += generated_chunks(samples_set(number), setting, rule, job.num_samples, kept)
    indices = grid_indices(rule.labels_of(np.arange(job.num_samples), inputs.generator.num_classes))
    grid = GeneratedSamples(job.settings[0], rule, indices)
    return [*chunks, Chunk(GRID, 0, len(indices), grid, Kept(len(indices), len(indices)))]


def grid_indices(labels: np.ndarray) -> np.ndarray:
    """Sample indices of the image grid: rows of equal length, one for each of up to GRID_CLASSES evenly spread classes.

    labels: int64 (N,), of all samples. Classes without samples are omitted.
    """
    classes, counts = np.unique(labels, return_counts=True)
    num_rows = min(len(classes), GRID_CLASSES)
    shown = np.arange(num_rows) * len(classes) // num_rows
    num_columns = min(GRID_COLUMNS, int(counts[shown].min()))
    return np.concatenate([np.flatnonzero(labels == label)[:num_columns] for label in classes[shown]])
