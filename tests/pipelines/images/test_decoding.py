import io
import pickle
import re
import shutil
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.encode.stages import decode_shard
from pipelines.errors import InputError
from pipelines.images.decoding import center_crop, decode_image, read_pixels
from pipelines.images.sources import ImageSlice, find_images


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_classes_are_ranks_of_sorted_folders_and_carry_their_names(image_root):
    _, listing, index = find_images(str(image_root / "train"))
    assert index.wnids == [f"d{label:07d}" for label in range(10)]
    assert index.class_names[8] == "star"
    assert len(index) == 60
    assert listing.files == sorted(listing.files)
    assert index.entries["sample_id"][0].as_py() == "d0000000/d0000000_0"
    labels = index.entries["label"].to_pylist()
    assert [index.wnids[label] for label in labels] == [path.split("/")[0] for path in listing.files]


def test_folders_without_a_names_file_are_named_after_themselves(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "a" / "b" / "c" / "d" / "val")
    _, _, index = find_images(str(tmp_path / "a" / "b" / "c" / "d" / "val"))
    assert index.class_names == index.wnids


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is a file, but must be a folder"),
        (lambda path: path.mkdir(), "no images in .*: wanted class folders"),
        (lambda path: (path.mkdir(), (path / "1.jpg").touch()), "put each into one"),
        (
            lambda path: [(path / "a").mkdir(parents=True), (path / "a/1.jpg").touch(), (path / "a/1.png").touch()],
            "extension",
        ),
    ],
    ids=["missing", "file", "empty", "stray", "same stem"],
)
def test_unfit_image_folders_are_refused(tmp_path, make, words):
    path = tmp_path / "images"
    make(path)
    with pytest.raises(InputError, match=words):
        find_images(str(path))


def test_crop_halves_with_a_box_then_scales_then_cuts_the_middle():
    # 1 x 4 blocks of 64: halved once to blocks of 32, no bicubic step left, and the middle two survive.
    row = np.repeat(np.array([0, 80, 160, 240], dtype=np.uint8), 64)
    image = Image.fromarray(np.broadcast_to(row, (128, 256)).copy())
    assert np.asarray(center_crop(image, 64))[10].tolist() == [80] * 32 + [160] * 32
    assert center_crop(Image.new("RGB", (500, 333)), 256).size == (256, 256)
    assert center_crop(Image.new("RGB", (20, 30)), 64).size == (64, 64)


def test_image_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), format="PNG")
    np.testing.assert_array_equal(decode_image(content, 64), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb_as_pillow_has_it(mode):
    source = Image.linear_gradient("L").resize((64, 64)).convert("RGB").convert(mode)
    content = encoded(source, format="TIFF")
    np.testing.assert_array_equal(decode_image(content, 64), np.asarray(source.convert("RGB")))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32] = 255
    decoded = decode_image(encoded(Image.fromarray(pixels), format="JPEG", exif=exif, quality=100), 64)
    assert decoded[:30].mean() > 250
    assert decoded[34:].mean() < 5


def test_one_bad_file_is_left_out_and_all_bad_is_an_error(image_root, tmp_path, caplog):
    shutil.copytree(image_root / "val", tmp_path / "val")
    victims = sorted((tmp_path / "val").rglob("*.JPEG"))
    victims[0].write_text("not an image")
    pixels, labels = read_pixels(*find_images(str(tmp_path / "val")), 64)
    assert pixels.shape == (39, 64, 64, 3)
    assert labels.shape == (39,)
    assert "left out unreadable" in caplog.text
    for victim in victims:
        victim.write_text("not an image")
    with pytest.raises(InputError, match="none of the 40 images"):
        read_pixels(*find_images(str(tmp_path / "val")), 64)


def bomb():
    """A PNG of a hundred million black pixels, some kilobytes long."""
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        return encoded(Image.new("1", (10_000, 10_000)), format="PNG")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def zero_sized():
    """A PNG whose header says width 0."""
    content = bytearray(encoded(Image.new("RGB", (4, 4)), format="PNG"))
    content[16:20] = bytes(4)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture(scope="module")
def photograph():
    """300 x 200 pixels that a crop changes."""
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((300, 200), Image.Resampling.BICUBIC)


def adm_crop(image, size):
    """openai/guided-diffusion's centre crop, written again from its description."""
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
    "really_a_png.JPEG": lambda image: encoded(image, format="PNG"),
    "palette.png": lambda image: encoded(image.convert("P"), format="PNG"),
    "transparent_palette.png": lambda image: encoded(image.quantize(16), format="PNG", transparency=3),
    "alpha.png": lambda image: encoded(Image.merge("RGBA", (*image.split(), image.split()[0])), format="PNG"),
    "grey_and_alpha.png": lambda image: encoded(image.convert("LA"), format="PNG"),
    "one_bit.png": lambda image: encoded(image.convert("1"), format="PNG"),
    "sixteen_bit.png": lambda image: encoded(image.convert("I;16"), format="PNG"),
    "lab_colours.png": lambda image: encoded(Image.merge("LAB", image.split()), format="TIFF"),
    "float.png": lambda image: encoded(image.convert("F"), format="TIFF"),
    "lossy.webp": lambda image: encoded(image, format="WEBP"),
    "turned.JPEG": lambda image: encoded(image, format="JPEG", exif=exif_orientation(6)),
    "broken_exif.JPEG": lambda image: encoded(image, format="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x40\0\xff\xff"),
    "small.png": lambda image: encoded(image.resize((30, 20)), format="PNG"),
    "wide.png": lambda image: encoded(image.resize((900, 3)), format="PNG"),
    "huge.png": lambda image: encoded(image.resize((1030, 700)), format="PNG"),
}
UNREADABLE = {
    "truncated.JPEG": (lambda image: encoded(image, format="JPEG")[:-900], "truncated"),
    "truncated_too.png": (lambda image: encoded(image, format="PNG")[:-900], "truncated|OSError|broken"),
    "header_alone.JPEG": (lambda image: encoded(image, format="JPEG")[:300], "(?i)truncated|cannot identify"),
    "empty.JPEG": (lambda image: b"", "cannot identify"),
    "text.JPEG": (lambda image: b"<html>404</html>", "cannot identify"),
    "bomb.png": (lambda image: bomb(), "DecompressionBomb"),
    "bomb_by_crop.png": (lambda image: encoded(image.resize((30_000, 1)), format="PNG"), "DecompressionBomb"),
    "zero_sized.png": (lambda image: zero_sized(), "cannot identify|size"),
}


def exif_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_awkward_images_come_out_as_pillow_has_them_or_are_rejected_with_a_reason(photograph, tmp_path):
    (tmp_path / "images/n0").mkdir(parents=True)
    contents = {name: make(photograph) for name, make in READABLE.items()}
    contents |= {name: make(photograph) for name, (make, _) in UNREADABLE.items()}
    for name, content in contents.items():
        (tmp_path / "images/n0" / name).write_bytes(content)
    images = ImageSlice.of(*find_images(str(tmp_path / "images")))
    shard = decode_shard({"shard": np.array([0]), "images": [pickle.dumps(images)]}, image_size=64)
    rows = dict(zip(shard["sample_id"], range(len(contents)), strict=True))
    for name in READABLE:
        row = rows["n0/" + name.rsplit(".", 1)[0]]
        assert shard["error"][row] == "", name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = adm_crop(Image.open(io.BytesIO(contents[name])).convert("RGB"), 64)
        np.testing.assert_array_equal(shard["pixels"][row], expected, err_msg=name)
    for name, (_, reason) in UNREADABLE.items():
        row = rows["n0/" + name.rsplit(".", 1)[0]]
        assert re.search(reason, shard["error"][row]), (name, shard["error"][row])
        assert not shard["pixels"][row].any()


def test_images_of_broken_exif_are_read_without_a_word(photograph, recwarn):
    decode_image(READABLE["broken_exif.JPEG"](photograph), 64)
    assert [str(warning.message) for warning in recwarn] == []
