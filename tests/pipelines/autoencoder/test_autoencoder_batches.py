"""Which images a worker trains on, and in which order."""

import itertools
import shutil

import numpy as np
import pytest

from pipelines.autoencoder.batches import ImageStream, worker_slices
from pipelines.errors import InputError
from pipelines.images.sources import find_images

SIZE = 16


@pytest.fixture(scope="module")
def source(image_root):
    """40 images."""
    return find_images(str(image_root / "val"))


def stream(source, **options) -> ImageStream:
    return ImageStream(source, SIZE, **{"seed": (0,), "rank": 0, "world_size": 1, **options})


def distinct(images) -> int:
    return len({image.tobytes() for image in images})


def test_every_image_belongs_to_one_worker():
    for num_images, world_size in ((3, 2), (40, 3), (5000, 4)):
        rows = [worker_slices(num_images, rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*itertools.chain(*rows))) == list(range(num_images))
        counts = [sum(map(len, slices)) for slices in rows]
        assert max(counts) <= 1.2 * min(counts) + 1
    assert max(map(len, worker_slices(1_281_167, 0, 8))) == 100


def test_cached_images_appear_once_per_epoch_in_a_new_order(source):
    batches = stream(source).batches(10)
    first, second = (np.concatenate(list(itertools.islice(batches, 4))) for _ in range(2))
    assert first.shape == (40, SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    assert distinct(first) == distinct(second) == 40
    assert distinct(np.concatenate([first, second])) == 40
    assert not np.array_equal(first, second)


def test_images_that_do_not_fit_into_the_cache_are_mixed_in_a_buffer(source):
    few = stream(source, cache_bytes=8 * 3 * SIZE**2, num_threads=2)
    images = np.concatenate(list(itertools.islice(few.batches(8), 25)))  # five epochs
    assert distinct(images) == 40
    in_order = np.concatenate(list(itertools.islice(stream(source, cache_bytes=1).batches(8), 5)))
    assert distinct(in_order) >= 38  # a buffer of one image delays an epoch's last one
    counts = {key: len(list(group)) for key, group in itertools.groupby(sorted(image.tobytes() for image in images))}
    assert max(counts.values()) <= 6


def test_order_is_a_function_of_the_seed(source):
    first, same, other = (next(stream(source, seed=(seed,)).batches(8)) for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_unreadable_images_are_left_out(image_root, tmp_path):
    folder = shutil.copytree(image_root / "val", tmp_path / "val")
    paths = sorted(folder.rglob("*.JPEG"))
    paths[0].write_bytes(b"not an image")
    images = np.concatenate(list(itertools.islice(stream(find_images(str(folder))).batches(13), 3)))
    assert distinct(images) == 39
    for path in paths:
        path.write_bytes(b"not an image")
    for cache_bytes in (1, 1 << 20):
        with pytest.raises(InputError, match="none of the training images in .* can be read"):
            next(stream(find_images(str(folder)), cache_bytes=cache_bytes).batches(1))
