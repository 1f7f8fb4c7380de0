"""The files of an image source (`Listing`), and its images, one entry each (`ImageIndex`)."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images.formats import Format

ENTRY_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("file", pa.int32()),  # position of the file in `Listing.files`
        ("position", pa.int64()),  # row in a Parquet file, byte offset in a tar
        ("size", pa.int64()),  # in bytes; 0 for Parquet, whose metadata has no image sizes
    ]
)

MapFiles = Callable[[Callable[[Any], Any], list], Iterable]
"""Applies a function to each item and yields the results in order, as the builtin `map` does."""


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

    def __len__(self) -> int:
        return self.entries.num_rows

    def to_bytes(self, source_sha256: str) -> bytes:
        """Serializes the index as Parquet, together with the hash of its listing."""
        metadata = {"class_names": self.class_names, "wnids": self.wnids, "source_sha256": source_sha256}
        buffer = io.BytesIO()
        pq.write_table(self.entries.replace_schema_metadata({b"meanflow.index": json.dumps(metadata).encode()}), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, source_sha256: str) -> "ImageIndex | None":
        """Reads the result of `to_bytes`. Returns None for a damaged index or one of another listing."""
        try:
            table = pq.read_table(io.BytesIO(content))
            metadata = json.loads(table.schema.metadata[b"meanflow.index"])
        except (pa.ArrowInvalid, KeyError, TypeError):
            return None
        if metadata["source_sha256"] != source_sha256:
            return None
        return cls(table.replace_schema_metadata(None).cast(ENTRY_SCHEMA), metadata["class_names"], metadata["wnids"])
