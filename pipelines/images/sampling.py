"""Which images represent a source, where only some of them are encoded or measured."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipelines.images.index import ImageIndex

GOLDEN_RATIO = (1 + 5**0.5) / 2


def sample_images(index: ImageIndex, num_images: int | None) -> ImageIndex:
    """Chooses at most `num_images` images of an index, and keeps their order. None: all.

    Folders and tars: images evenly spaced over the source. Parquet: equally many images of each class, as far as the class
    has them, from few row groups that are spread evenly over the source (at least one per class if the files are sorted by
    class), because a row group can only be read as a whole.
    """
    if num_images is None or num_images >= len(index):
        return index
    choose = _evenly_spaced if index.entries["row_group"].null_count else _from_few_row_groups
    return replace(index, entries=index.entries.take(pa.array(choose(index, num_images))))


def _evenly_spaced(index: ImageIndex, num_images: int) -> np.ndarray:
    return np.arange(num_images) * len(index) // num_images


def _from_few_row_groups(index: ImageIndex, num_images: int) -> np.ndarray:
    """Visits the row groups in a fixed order, and takes the first image of each class, then the second, and so on."""
    file, group, labels = (index.entries[name].to_numpy() for name in ("file", "row_group", "label"))
    is_first = (np.diff(file, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0)
    # The fractional parts of multiples of the golden ratio are evenly spread. So are therefore the first k row groups in
    # this order, for any k.
    order = np.argsort(np.cumsum(is_first) * GOLDEN_RATIO % 1, kind="stable")
    rank = _rank_within_class(labels[order])
    return np.sort(order[np.argsort(rank, kind="stable")[:num_images]])


def _rank_within_class(labels: np.ndarray) -> np.ndarray:
    """How many earlier elements have the same label."""
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return rank
