"""The files of an image source (`Listing`), and its images, one entry each (`ImageIndex`)."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.images.formats import Format

ENTRY_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("file", pa.int32()),  # position of the file in `Listing.files`
        ("position", pa.int64()),  # row in a Parquet file, byte offset in a tar
        ("size", pa.int64()),  # in bytes; 0 for Parquet, whose metadata has no image sizes
        ("row_group", pa.int32()),  # of a Parquet file; null elsewhere
    ]
)

Map = Callable[[Callable[[Any], Any], list], Iterable]
"""Applies a function to each item and yields the results in order, as the builtin `map` does."""


class ImageFile(NamedTuple):
    """A file of a source."""

    path: str
    """Relative to the root."""
    size: int
    """In bytes, when it was listed."""

    def gone(self) -> str:
        """Message for a file that no longer exists."""
        return f"{self.path} is gone since the images were listed"

    def changed(self, size: int) -> str:
        """Message for a file that has another size now."""
        return f"{self.path} has changed since the images were listed: it has {size} bytes instead of {self.size}"


@dataclass(frozen=True)
class Listing:
    """The files of a source."""

    location: str
    """Path or URI as the user gave it."""
    root: str
    """Folder within the file system."""
    format: Format
    """Format of the files."""
    files: list[str]
    """Sorted paths relative to the root."""
    sizes: list[int]
    """File sizes in bytes."""

    @property
    def sha256(self) -> str:
        """Hash of the format, paths and sizes. It identifies the source of a latent dataset."""
        lines = (f"{path}\t{size}\n" for path, size in zip(self.files, self.sizes, strict=True))
        return hashlib.sha256((self.format + "\n" + "".join(lines)).encode()).hexdigest()


@dataclass(frozen=True)
class ImageIndex:
    """All images of a source, in the order of the files and of the images within each file."""

    entries: pa.Table
    """One row per image, with ENTRY_SCHEMA."""
    class_names: list[str]
    """Name of each class id."""
    wnids: list[str]
    """WordNet id or folder name of each class id; empty strings if the source has none."""

    def class_counts(self, num_classes: int) -> list[int]:
        """Number of images of each class, at least `num_classes` numbers."""
        counts: list[int] = np.bincount(self.entries["label"].to_numpy(), minlength=num_classes).tolist()
        return counts

    def __len__(self) -> int:
        return self.entries.num_rows


ImageSource = tuple[fs.FileSystem, Listing, ImageIndex]
"""A source that was found: what `sources.find_images` returns."""
