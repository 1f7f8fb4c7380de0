"""A source of images in any supported format: list its files, index its images, read some of them.

Listing reads file names and sizes only. Indexing also reads two Parquet columns or tar headers; tars in an object store are
streamed as a whole. The result depends on the files alone, so every process that slices the index gets the same images.
Reading takes only the images of a slice: image files, parts of tars, and the image column of Parquet row groups.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Protocol, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError
from pipelines.images.formats import Format
from pipelines.images.index import ImageFile, ImageIndex, Listing, Map
from pipelines.images.stored import INDEX, read_index_bytes


class FormatReader(Protocol):
    """Interface of a format's module, for example folders.py."""

    EXTENSIONS: tuple[str, ...]
    """Lower-case endings of its files."""

    def check_files(self, location: str, files: list[str], folders: list[str]) -> None:
        """Raises InputError for a set of files that is ambiguous or incomplete."""

    def index(self, filesystem: fs.FileSystem, listing: Listing, map_files: Map) -> ImageIndex:
        """Builds the index. Raises InputError for images without a label and labels without an image."""

    def read(
        self, filesystem: fs.FileSystem, root: str, files: dict[int, ImageFile], entries: pa.Table
    ) -> Iterator[bytes | Exception]:
        """Yields the bytes of each entry's image in order, or the reason why there are none."""


def _reader(image_format: Format) -> FormatReader:
    return cast("FormatReader", importlib.import_module(f"pipelines.images.{image_format}"))


def list_images(location: str, image_format: Format | None = None) -> tuple[fs.FileSystem, Listing]:
    """Lists the files of a source.

    location: a folder, or a pattern of file names in a folder, such as "data/train-*.parquet".
    image_format: default: detected from the file names.
    Raises InputError for no files of the format, several formats or splits, and classes without images.
    """
    folder, pattern = _split(location)
    if location.lower().endswith(("-ubyte", "-ubyte.gz")) and "*" not in location:
        raise InputError(f"{location} is half of a pair; name images and labels by a pattern such as .../train-*")
    filesystem, root = storage.require_folder(folder, "image folder")
    infos = storage.list_folder(filesystem, root)
    paths = {info.path[len(root) :].lstrip("/"): info for info in infos}
    sizes = {
        path: info.size
        for path, info in paths.items()
        if info.type == fs.FileType.File and fnmatch(path.rsplit("/", 1)[-1], pattern)
    }
    files = {
        candidate: sorted(path for path in sizes if path.lower().endswith(_reader(candidate).EXTENSIONS))
        for candidate in get_args(Format)
    }
    present = [candidate for candidate in files if files[candidate]]
    if not present:
        raise InputError(
            f"no images in {location}; expected class folders of .jpeg, .jpg, .png, .webp or .bmp files such as "
            f"{folder}/n01440764/n01440764_18.JPEG, or .parquet files, or .tar files of a WebDataset, or IDX files such as "
            f"train-images-idx3-ubyte.gz"
        )
    if image_format is None and len(present) > 1:
        raise InputError(
            f"{location} contains {' and '.join(present)}; select one with --format, or a folder of one format"
        )
    chosen: Format = image_format or present[0]
    if not files[chosen]:
        raise InputError(f"no {chosen} in {location}, but {' and '.join(present)}; omit --format, or select another")
    folders = [path for path, info in paths.items() if info.type == fs.FileType.Directory]
    _reader(chosen).check_files(location, files[chosen], folders)
    return filesystem, Listing(location, root, chosen, files[chosen], [sizes[path] for path in files[chosen]])


def _split(location: str) -> tuple[str, str]:
    """The folder of a location, and the pattern of its file names."""
    parent, _, name = location.rpartition("/")
    return (parent or ".", name) if "*" in name or _is_file(location) else (location, "*")


def _is_file(location: str) -> bool:
    if not location.lower().endswith((".parquet", ".tar")):
        return False
    filesystem, path = storage.open_storage(location)
    return filesystem.get_file_info(path).type == fs.FileType.File


def index_images(filesystem: fs.FileSystem, listing: Listing, map_files: Map = map) -> ImageIndex:
    """Builds the index of a listing.

    map_files: like the builtin `map`; may index the files of packed formats in parallel, for example on a cluster.
    Raises InputError for duplicate ids, images without a label, labels without an image, and labels without a class name.
    """
    index = _reader(listing.format).index(filesystem, listing, map_files)
    counts = pc.value_counts(index.entries["sample_id"])
    duplicates = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(duplicates):
        raise InputError(
            f"{len(duplicates)} ids in {listing.location} belong to several images, such as "
            f"{', '.join(duplicates[:3].to_pylist())}; an id is the path without its extension, image.path, or the key "
            f"of a sample, so rename all but one"
        )
    return index


def find_images(location: str, image_format: Format | None = None) -> tuple[fs.FileSystem, Listing, ImageIndex]:
    """Lists and indexes a source. For a latent dataset, opens the images from which it was encoded, without listing them.

    Raises InputError as `list_images`, `index_images` and `open_encoded_images` do.
    """
    filesystem, root = storage.open_storage(location)
    if filesystem.get_file_info(f"{root}/{INDEX}").type == fs.FileType.File:
        return open_encoded_images(location)
    filesystem, listing = list_images(location, image_format)
    return filesystem, listing, index_images(filesystem, listing)


def open_encoded_images(dataset: str, location: str | None = None) -> tuple[fs.FileSystem, Listing, ImageIndex]:
    """Opens the images from which a latent dataset was encoded, by the index that it contains. Lists nothing.

    location: where the images are now. Default: where they were when they were encoded.
    Raises InputError if their folder does not exist. A file that is gone or has changed is an error when it is read.
    """
    filesystem, root = storage.open_storage(dataset)
    content = storage.read_bytes(filesystem, f"{root}/{INDEX}")
    listing, index = read_index_bytes(content, f"{dataset}/{INDEX}")
    location = location or listing.location
    filesystem, root = storage.require_folder(_split(location)[0], "image folder")
    return filesystem, replace(listing, location=location, root=root), index


@dataclass(frozen=True)
class ImageSlice:
    """Some images of a source. A pickled slice is all that another process needs to read them."""

    filesystem: fs.FileSystem
    root: str
    format: Format
    files: dict[int, ImageFile]
    """The files that the entries refer to, by their position in the listing."""
    entries: pa.Table
    """One row per image, with ENTRY_SCHEMA."""

    @classmethod
    def of(
        cls, filesystem: fs.FileSystem, listing: Listing, index: ImageIndex, rows: np.ndarray | None = None
    ) -> "ImageSlice":
        """Selects rows (int64, ascending) of the index. Default: all."""
        # `take` copies. A slice of the table would be pickled together with the whole table.
        entries = index.entries if rows is None else index.entries.take(pa.array(rows))
        numbers = pc.unique(entries["file"]).to_pylist()
        files = {number: ImageFile(listing.files[number], listing.sizes[number]) for number in numbers}
        return cls(filesystem, listing.root, listing.format, files, entries.combine_chunks())

    def read(self) -> Iterator[bytes | Exception]:
        """Yields the bytes of each image in order, or the reason why there are none.

        Storage errors are raised, since they do not mean that the image is unreadable.
        """
        return _reader(self.format).read(self.filesystem, self.root, self.files, self.entries)
