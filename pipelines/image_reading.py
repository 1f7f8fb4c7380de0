"""Image files -> pixels: decoding, and ADM's centre crop."""

import io
import logging
import warnings

import numpy as np
from PIL import Image
from pyarrow import fs

from pipelines.command import InputError
from pipelines.image_sources import ImageIndex, ImageSlice, Listing

logger = logging.getLogger(__name__)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size): halve with a box filter while twice too large, then bicubic, then crop.

    Source: center_crop_arr of openai/guided-diffusion (MIT), which DiT, SiT and MeanFlow use; rewritten.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_image(content: bytes, size: int) -> np.ndarray:
    """The bytes of an image file -> uint8 RGB (size, size, 3). EXIF orientation is not applied, as nowhere in the field.

    Raises what Pillow raises for bytes that it cannot read, and where an image is larger than its limit against
    decompression bombs, or so narrow that its crop would be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and the like: pixels are what counts
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content)) as image:
            scaled = max(image.size) * size / min(image.size) * size
            if Image.MAX_IMAGE_PIXELS is not None and scaled > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"cropped to {size} pixels, an image of {image.width}x{image.height} has {scaled:.0f} on the way, "
                    f"more than Pillow's limit of {Image.MAX_IMAGE_PIXELS}"
                )
            return np.array(center_crop(image.convert("RGB"), size))  # a copy: Pillow's own is read-only


def read_pixels(
    filesystem: fs.FileSystem, listing: Listing, index: ImageIndex, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """All readable images of a source: uint8 (N, size, size, 3), and labels int64 (N,); the others are logged."""
    pixels, labels = [], []
    images = ImageSlice.of(filesystem, listing, index).read()
    for content, entry in zip(images, index.entries.to_pylist(), strict=True):
        try:
            if isinstance(content, Exception):
                raise content
            pixels.append(decode_image(content, size))
            labels.append(entry["label"])
        except Exception as error:  # Pillow raises many kinds; one bad file must not end an evaluation
            logger.warning("left out unreadable %s: %s", entry["sample_id"], error)
    if not pixels:
        raise InputError(f"none of the {len(index)} images in {listing.location} can be read")
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)
