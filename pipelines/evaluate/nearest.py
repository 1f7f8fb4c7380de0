"""A figure of samples above their nearest training images in feature space."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from meanflow_core.grids import image_grid
from pipelines.errors import InputError
from pipelines.evaluate.feature_distances import nearest_indices
from pipelines.evaluate.inputs import Inputs
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.plan import GRID, TRAINING_IMAGES, neighbour_source
from pipelines.evaluate.sums import SetSums
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice

INCHES_PER_IMAGE = 0.75
DPI = 160


@dataclass(frozen=True)
class NearestRow:
    """Samples of one class, and the training image nearest to each."""

    class_name: str
    samples: np.ndarray
    """uint8 (n, H, W, 3)."""
    nearest: np.ndarray
    """uint8 (n, H, W, 3)."""


def nearest_training_images(job: EvaluateJob, inputs: Inputs, sets: Mapping[str, SetSums]) -> list[NearestRow]:
    """The grid's samples, and for each the training image whose features are nearest. One row per class, in the grid's order.

    Raises InputError for a training image that has become unreadable since it was measured.
    """
    assert inputs.generator is not None
    grid, train = sets[GRID], sets[TRAINING_IMAGES]
    nearest = nearest_indices(torch.cat(grid.features), torch.cat(train.features))
    pixels = _read_rows(job, inputs, torch.cat(train.feature_rows)[nearest].numpy())
    samples, labels = torch.cat(grid.images).numpy(), torch.cat(grid.labels).numpy()
    return [
        NearestRow(inputs.generator.class_names[label], samples[labels == label], pixels[labels == label])
        for label in dict.fromkeys(labels.tolist())
    ]


def _read_rows(job: EvaluateJob, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
    """Reads training images by their rows in the measured source: uint8 (n, H, W, 3), in the order of `rows`."""
    unique, positions = np.unique(rows, return_inverse=True)
    images = ImageSlice.of(*neighbour_source(job, inputs), unique)
    decoded = list(decode_images(images, inputs.image_size))
    for image, name in zip(decoded, images.entries["sample_id"].to_pylist(), strict=True):
        if isinstance(image, Exception):
            raise InputError(f"the training image {name} could be read before, but not again: {image}; evaluate again")
    return np.stack([image for image in decoded if not isinstance(image, Exception)])[positions]


def plot_nearest(rows: list[NearestRow], title: str, path: Path) -> None:
    """Plots two lines of images per class: samples, and below each its nearest training image. title: of the setting."""
    num_columns = max(len(row.samples) for row in rows)
    size = (INCHES_PER_IMAGE * num_columns + 1.4, (2 * INCHES_PER_IMAGE + 0.15) * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    for axis, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axis.imshow(image_grid(np.concatenate([row.samples, row.nearest]), len(row.samples)))
        height = row.samples.shape[1]
        axis.set_yticks([height / 2, height * 1.5], [row.class_name, "nearest"], fontsize="x-small")
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    figure.suptitle(f"samples ({title}), each above its nearest training image in feature space", fontsize="small")
    figure.savefig(path, dpi=DPI, bbox_inches="tight")  # else long class names are cut
