import numpy as np
import pyarrow as pa
import pytest

from pipelines.images.index import ENTRY_SCHEMA, ImageIndex
from pipelines.images.sampling import sample_images

NUM_CLASSES, NUM_IMAGES, GROUP_SIZE, FILE_SIZE = 50, 20_000, 100, 4_000


def index_of(labels, row_groups=True):
    rows = np.arange(len(labels))
    columns = {
        "sample_id": rows.astype(str),
        "label": labels,
        "file": rows // FILE_SIZE,
        "position": rows % FILE_SIZE,
        "size": np.zeros(len(rows), np.int64),
        "row_group": rows % FILE_SIZE // GROUP_SIZE if row_groups else pa.nulls(len(rows)),
    }
    return ImageIndex(pa.table(columns).cast(ENTRY_SCHEMA), [], [])


def rows_of(index):
    return np.array(index.entries["sample_id"].to_pylist(), np.int64)


SORTED = np.arange(NUM_IMAGES) * NUM_CLASSES // NUM_IMAGES
SHUFFLED = np.random.default_rng(0).permutation(SORTED)


@pytest.mark.parametrize("labels", [SORTED, SHUFFLED], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("num_images", [50, 120, 1000])
def test_parquet_sample_has_equally_many_images_of_each_class_from_few_row_groups(labels, num_images):
    sample = sample_images(index_of(labels), num_images)
    rows = rows_of(sample)
    assert len(set(rows)) == num_images
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(labels[rows], minlength=NUM_CLASSES)
    assert counts.max() - counts.min() <= 1
    num_groups = len(np.unique(rows // GROUP_SIZE))
    assert num_groups <= (NUM_CLASSES if labels is SORTED else 0.2 * num_images)  # a class of SORTED fills 4 row groups
    assert (
        num_groups < len(np.unique(np.arange(num_images) * NUM_IMAGES // num_images // GROUP_SIZE)) or num_images == 50
    )


def test_parquet_sample_is_spread_over_the_source():
    rows = rows_of(sample_images(index_of(np.zeros(NUM_IMAGES, np.int32)), 2000))
    groups = np.unique(rows // GROUP_SIZE)
    assert len(groups) == 20  # of 200, all of their images
    assert np.diff(groups, prepend=0, append=200).max() <= 2 * 10


def test_small_class_gives_all_its_images():
    labels = np.where(np.arange(NUM_IMAGES) < 3, 1, 0)
    sample = sample_images(index_of(labels), 500)
    assert np.bincount(labels[rows_of(sample)]).tolist() == [497, 3]


def test_images_that_are_read_one_by_one_are_evenly_spaced():
    sample = sample_images(index_of(SORTED, row_groups=False), 40)
    assert rows_of(sample).tolist() == list(range(0, NUM_IMAGES, 500))


@pytest.mark.parametrize("num_images", [None, NUM_IMAGES, NUM_IMAGES + 1])
def test_no_limit_keeps_all_images(num_images):
    index = index_of(SORTED)
    assert sample_images(index, num_images) is index
