"""Image files -> pixels."""

import functools
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.images.center_crop import center_crop
from pipelines.images.index import ImageIndex, Listing, Map
from pipelines.images.sampling import sample_images
from pipelines.images.sources import ImageSlice
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

SLICE_SIZE = 100  # images per task: half a second of decoding, 20 MB of pixels at 256x256


def decode_image(content: bytes, size: int) -> np.ndarray:
    """Decodes and crops an image file. Returns uint8 RGB (size, size, 3).

    EXIF orientation is ignored, as in all published ImageNet pipelines. Raises Pillow's errors for invalid files, for
    images above its limit against decompression bombs, and for images so narrow that resizing would exceed it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example broken EXIF, which does not affect the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content)) as image:
            resized_pixels = max(image.size) * size / min(image.size) * size
            if Image.MAX_IMAGE_PIXELS is not None and resized_pixels > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"resizing {image.width}x{image.height} for a crop of {size} pixels takes {resized_pixels:.0f} pixels, "
                    f"more than Pillow's limit of {Image.MAX_IMAGE_PIXELS}"
                )
            return np.array(center_crop(image.convert("RGB"), size))  # copied: Pillow's buffer is read-only


def decode_images(images: ImageSlice, size: int) -> Iterator[np.ndarray | Exception]:
    """Yields each image of a slice as uint8 RGB (size, size, 3), or the reason why it cannot be read.

    Storage errors are raised, since they do not mean that the image is unreadable.
    """
    for content in images.read():
        if isinstance(content, Exception):
            yield content
            continue
        try:
            pixels = decode_image(content, size)
        except Exception as error:  # Pillow raises many types; each concerns this image only
            yield error
        else:
            yield pixels


def read_pixels(
    filesystem: fs.FileSystem,
    listing: Listing,
    index: ImageIndex,
    size: int,
    num_images: int | None = None,
    map_slices: Map = map,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads images chosen by `sample_images`. Unreadable ones are logged and left out.

    num_images: maximum number of images (default: all).
    map_slices: like the builtin `map`; may read slices of SLICE_SIZE images in parallel, for example on a cluster.
    Returns pixels uint8 (N, size, size, 3) and labels int64 (N,).
    """
    chosen = sample_images(index, num_images)
    parts = np.split(np.arange(len(chosen)), range(SLICE_SIZE, len(chosen), SLICE_SIZE))
    slices = [ImageSlice.of(filesystem, listing, chosen, rows) for rows in parts]
    progress = Progress(logger, "read", "images", len(chosen))
    pixels, labels, num_done = [], [], 0
    for some_pixels, some_labels, problems in map_slices(functools.partial(_read_slice, size=size), slices):
        pixels.append(some_pixels)
        labels.append(some_labels)
        for problem in problems:
            logger.warning("left out unreadable %s", problem)
        num_done += len(some_labels) + len(problems)
        progress.update(num_done)
    if not any(map(len, labels)):
        raise InputError(f"none of the {len(chosen)} images in {listing.location} can be read")
    return np.concatenate(pixels), np.concatenate(labels)


def _read_slice(images: ImageSlice, size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the pixels and labels of the readable images of a slice, and the problems of the others."""
    pixels, labels, problems = [], [], []
    for image, entry in zip(decode_images(images, size), images.entries.to_pylist(), strict=True):
        if isinstance(image, Exception):
            problems.append(f"{entry['sample_id']}: {image}")
        else:
            pixels.append(image)
            labels.append(entry["label"])
    array = np.array(pixels, np.uint8).reshape(-1, size, size, 3)
    return array, np.array(labels, np.int64), problems
