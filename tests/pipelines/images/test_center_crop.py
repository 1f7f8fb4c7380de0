import numpy as np
from PIL import Image

from pipelines.images.center_crop import center_crop


def test_crop_halves_with_a_box_filter_and_cuts_the_centre():
    # Four columns of 64 pixels: one halving to 32 leaves nothing to resize, and the two central ones remain.
    columns = np.repeat(np.array([0, 80, 160, 240], dtype=np.uint8), 64)
    image = Image.fromarray(np.broadcast_to(columns, (128, 256)).copy())
    assert np.asarray(center_crop(image, 64))[10].tolist() == [80] * 32 + [160] * 32


def test_crop_is_square_for_any_shape():
    assert center_crop(Image.new("RGB", (500, 333)), 256).size == (256, 256)
    assert center_crop(Image.new("RGB", (20, 30)), 64).size == (64, 64)


def test_image_of_the_right_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), 64)), pixels)
