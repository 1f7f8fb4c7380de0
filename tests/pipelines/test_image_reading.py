import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.command import InputError
from pipelines.image_reading import center_crop, decode_image, read_pixels
from pipelines.image_sources import find_images


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
        (lambda path: path.write_text("x"), "is a file, but a folder is wanted"),
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
