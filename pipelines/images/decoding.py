"""Image files -> pixels."""

import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.images.center_crop import center_crop
from pipelines.images.index import ImageIndex, Listing
from pipelines.images.sources import ImageSlice

logger = logging.getLogger(__name__)


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
    filesystem: fs.FileSystem, listing: Listing, index: ImageIndex, size: int, num_images: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads images, evenly spaced over the source. Unreadable ones are logged and left out.

    num_images: maximum number of images (default: all).
    Returns pixels uint8 (N, size, size, 3) and labels int64 (N,).
    """
    count = len(index)
    num_chosen = min(count if num_images is None else num_images, count)
    images = ImageSlice.of(filesystem, listing, index, np.arange(num_chosen) * count // max(num_chosen, 1))
    pixels, labels = [], []
    for image, entry in zip(decode_images(images, size), images.entries.to_pylist(), strict=True):
        if isinstance(image, Exception):
            logger.warning("left out unreadable %s: %s", entry["sample_id"], image)
        else:
            pixels.append(image)
            labels.append(entry["label"])
    if not pixels:
        raise InputError(f"none of the {num_chosen} images in {listing.location} can be read")
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)
