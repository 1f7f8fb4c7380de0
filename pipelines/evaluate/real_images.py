"""Finds real images whose classes match the generator's, and loads evenly spread subsets of them."""

from collections.abc import Sequence

import numpy as np
import torch

from pipelines.errors import InputError
from pipelines.images.decoding import read_pixels
from pipelines.images.index import ImageSource, Map
from pipelines.images.sources import find_images


def find_real_images(location: str, class_names: Sequence[str] | None) -> ImageSource:
    """Finds images and checks their classes. class_names: the generator's; None accepts any classes.

    Raises InputError if the classes differ, or a class has fewer than two images.
    """
    source = find_images(location)
    index = source[2]
    if class_names is None:
        return source
    if index.class_names != list(class_names):
        raise InputError(
            f"{location} must have images of exactly the generator's classes {', '.join(class_names)}, but has "
            f"{', '.join(index.class_names)}"
        )
    counts = np.bincount(index.entries["label"].to_numpy(), minlength=len(class_names))
    if counts.min() < 2:
        smallest = class_names[int(counts.argmin())]
        raise InputError(f"{location} must have at least 2 images per class, but has {counts.min()} of {smallest}")
    return source


def read_evenly(
    images: ImageSource, size: int, num_images: int, map_slices: Map = map
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads at most `num_images` readable images spread evenly over a source: uint8 (N, size, size, 3), labels (N,).

    map_slices: like the builtin `map`; may read in parallel.
    """
    pixels, labels = read_pixels(*images, size, num_images, map_slices)
    return torch.from_numpy(pixels), torch.from_numpy(labels)
