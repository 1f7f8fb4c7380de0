import io
import pickle
import re
import shutil
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.images import decoding
from pipelines.images.decoding import decode_image, decode_images, read_pixels
from pipelines.images.sources import ImageSlice, find_images


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def exif_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def decompression_bomb():
    """A PNG of 100 million black pixels in a few kilobytes."""
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        return encoded(Image.new("1", (10_000, 10_000)), format="PNG")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def zero_width():
    """A PNG with width 0 in its header."""
    content = bytearray(encoded(Image.new("RGB", (4, 4)), format="PNG"))
    content[16:20] = bytes(4)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture(scope="module")
def photograph():
    """300 x 200 pixels, so that cropping resizes."""
    small = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((300, 200), Image.Resampling.BICUBIC)


def adm_crop(image, size):
    """An independent implementation of openai/guided-diffusion's centre crop."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    array = np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


READABLE = {
    "plain.JPEG": lambda image: encoded(image, format="JPEG", quality=95),
    "progressive.JPEG": lambda image: encoded(image, format="JPEG", progressive=True),
    "cmyk.JPEG": lambda image: encoded(image.convert("CMYK"), format="JPEG"),
    "greyscale.JPEG": lambda image: encoded(image.convert("L"), format="JPEG"),
    "png_named.JPEG": lambda image: encoded(image, format="PNG"),
    "palette.png": lambda image: encoded(image.convert("P"), format="PNG"),
    "transparent_palette.png": lambda image: encoded(image.quantize(16), format="PNG", transparency=3),
    "alpha.png": lambda image: encoded(Image.merge("RGBA", (*image.split(), image.split()[0])), format="PNG"),
    "grey_and_alpha.png": lambda image: encoded(image.convert("LA"), format="PNG"),
    "one_bit.png": lambda image: encoded(image.convert("1"), format="PNG"),
    "sixteen_bit.png": lambda image: encoded(image.convert("I;16"), format="PNG"),
    "lab_colours.png": lambda image: encoded(Image.merge("LAB", image.split()), format="TIFF"),
    "float.png": lambda image: encoded(image.convert("F"), format="TIFF"),
    "lossy.webp": lambda image: encoded(image, format="WEBP"),
    "rotated_by_exif.JPEG": lambda image: encoded(image, format="JPEG", exif=exif_orientation(6)),
    "broken_exif.JPEG": lambda image: encoded(image, format="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x40\0\xff\xff"),
    "small.png": lambda image: encoded(image.resize((30, 20)), format="PNG"),
    "wide.png": lambda image: encoded(image.resize((900, 3)), format="PNG"),
    "huge.png": lambda image: encoded(image.resize((1030, 700)), format="PNG"),
}
UNREADABLE = {
    "truncated.JPEG": (lambda image: encoded(image, format="JPEG")[:-900], "truncated"),
    "truncated_too.png": (lambda image: encoded(image, format="PNG")[:-900], "truncated|broken"),
    "header_alone.JPEG": (lambda image: encoded(image, format="JPEG")[:300], "(?i)truncated|cannot identify"),
    "empty.JPEG": (lambda image: b"", "cannot identify"),
    "text.JPEG": (lambda image: b"<html>404</html>", "cannot identify"),
    "bomb.png": (lambda image: decompression_bomb(), "decompression bomb"),
    "bomb_by_crop.png": (lambda image: encoded(image.resize((30_000, 1)), format="PNG"), "more than Pillow's limit"),
    "zero_width.png": (lambda image: zero_width(), "cannot identify|size"),
}


@pytest.mark.parametrize("name", READABLE)
def test_readable_image_is_converted_to_rgb_and_cropped(photograph, name, recwarn):
    content = READABLE[name](photograph)
    pixels = decode_image(content, 64)
    assert [str(warning.message) for warning in recwarn] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = adm_crop(Image.open(io.BytesIO(content)).convert("RGB"), 64)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_raises_with_a_reason(photograph, name):
    make, reason = UNREADABLE[name]
    with pytest.raises(Exception, match=reason):
        decode_image(make(photograph), 64)


def test_unreadable_images_of_a_slice_are_yielded_as_errors(photograph, tmp_path):
    (tmp_path / "n0").mkdir()
    contents = {"a.png": READABLE["alpha.png"](photograph), "b.png": b"", "c.JPEG": READABLE["plain.JPEG"](photograph)}
    for name, content in contents.items():
        (tmp_path / "n0" / name).write_bytes(content)
    first, second, third = decode_images(ImageSlice.of(*find_images(str(tmp_path))), 64)
    assert first.shape == third.shape == (64, 64, 3)
    assert re.search("cannot identify", str(second))


def test_slices_read_in_other_processes_give_the_same_pixels(image_root, monkeypatch):
    monkeypatch.setattr(decoding, "SLICE_SIZE", 7)
    source = find_images(str(image_root / "val"))
    num_read = []

    def elsewhere(function, slices):
        num_read.extend(len(images.entries) for images in slices)
        return [pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(images))) for images in slices]

    pixels, labels = read_pixels(*source, 64, 20, elsewhere)
    assert num_read == [7, 7, 6]
    whole, all_labels = read_pixels(*source, 64)
    np.testing.assert_array_equal(pixels, whole[::2])
    np.testing.assert_array_equal(labels, all_labels[::2])


def test_read_pixels_leaves_out_unreadable_images_and_requires_one(image_root, tmp_path, caplog):
    shutil.copytree(image_root / "val", tmp_path / "val")
    paths = sorted((tmp_path / "val").rglob("*.JPEG"))
    paths[0].write_text("not an image")
    pixels, labels = read_pixels(*find_images(str(tmp_path / "val")), 64)
    assert pixels.shape == (39, 64, 64, 3)
    assert labels.shape == (39,)
    assert "left out unreadable d0000000/d0000000_" in caplog.text
    for path in paths:
        path.write_text("not an image")
    with pytest.raises(InputError, match="none of the 40 images"):
        read_pixels(*find_images(str(tmp_path / "val")), 64)
