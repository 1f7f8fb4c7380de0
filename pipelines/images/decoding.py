"""Image files -> pixels: decoding, and ADM's centre crop."""

import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.images.sources import ImageIndex, ImageSlice, Listing

logger = logging.getLogger(__name__)

CROP = "adm_center_crop"  # what `center_crop` does, as recipes and protocols name it


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


def decode_images(images: ImageSlice, size: int) -> Iterator[np.ndarray | Exception]:
    """Every image of a slice in its order: uint8 RGB (size, size, 3), or why it cannot be read.

    Raises what storage raises where it fails: that says nothing of an image.
    """
    for content in images.read():
        if isinstance(content, Exception):
            yield content
            continue
        try:
            pixels = decode_image(content, size)
        except Exception as error:  # Pillow raises many kinds; whatever it is, it belongs to this one image
            yield error
        else:
            yield pixels


def read_pixels(
    filesystem: fs.FileSystem, listing: Listing, index: ImageIndex, size: int, num_images: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Readable images of a source: uint8 (N, size, size, 3), and labels int64 (N,); the others are logged.

    num_images: as many at most, spread evenly over the source; all of them unless given.
    """
    count = len(index)
    kept = min(count if num_images is None else num_images, count)
    images = ImageSlice.of(filesystem, listing, index, np.arange(kept) * count // max(kept, 1))
    pixels, labels = [], []
    for image, entry in zip(decode_images(images, size), images.entries.to_pylist(), strict=True):
        if isinstance(image, Exception):
            logger.warning("left out unreadable %s: %s", entry["sample_id"], image)
        else:
            pixels.append(image)
            labels.append(entry["label"])
    if not pixels:
        raise InputError(f"none of the {kept} images in {listing.location} can be read")
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)
