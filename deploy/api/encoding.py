"""Encodes images: PNG, JPEG, WebP, a grid, or a ZIP."""

import io
import math
import zipfile
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from meanflow_core.grids import image_grid

ImageFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
DEFAULT_QUALITY = 90
# Faster than Pillow's default, by 20 % (photograph, 256 px) to 67 % (drawing, 64 px); files grow by a few per cent.
PNG_COMPRESS_LEVEL = 3


def encode_image(image: np.ndarray, image_format: ImageFormat = "png", quality: int | None = None) -> bytes:
    """uint8 (H, W, 3) -> bytes of a file. quality: 0 to 100, for JPEG and WebP; PNG is lossless and ignores it."""
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    else:
        quality = DEFAULT_QUALITY if quality is None else quality
        Image.fromarray(image).save(buffer, format=image_format.upper(), quality=quality)
    return buffer.getvalue()


def encode_grid(images: np.ndarray) -> bytes:
    """uint8 (N, H, W, 3) -> one PNG: the image itself, or several in a grid that is as square as possible."""
    if len(images) == 1:
        return encode_image(images[0])
    return encode_image(image_grid(images, num_columns=math.ceil(math.sqrt(len(images)))))


def encode_zip(images: np.ndarray, names: Sequence[str]) -> bytes:
    """uint8 (N, H, W, 3) -> a ZIP of PNGs with these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for image, name in zip(images, names, strict=True):
            archive.writestr(name, encode_image(image))
    return buffer.getvalue()
