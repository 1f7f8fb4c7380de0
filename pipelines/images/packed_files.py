"""Code shared by the packed formats, Parquet, WebDataset and IDX. Each file contains many images; labels are class ids."""

import functools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.images.class_names import name_classes, read_class_names, read_names_by_id
from pipelines.images.index import ENTRY_SCHEMA, ImageFile, ImageIndex, Listing, Map
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

SPLIT = re.compile(r"(?:^|[-_.])(train|val|validation|test)(?=[-_.])")


@dataclass(frozen=True)
class FileIndex:
    """The index of one file."""

    entries: pa.Table
    """One row per image, with the columns of ENTRY_SCHEMA except `file`."""
    problems: list[str]
    """Messages about samples that cannot be used."""
    class_names: list[str] | None = None
    """Class names stored in the file."""


def check_one_split(location: str, files: list[str], folders: list[str]) -> None:
    """Implements `FormatReader.check_files`. Raises InputError if the file names contain more than one split."""
    splits = sorted({split for path in files for split in SPLIT.findall(path.rsplit("/", 1)[-1])})
    if len(splits) > 1:
        folder = location.rpartition("/")[0] if "*" in location else location
        extension = files[0].rpartition(".")[2]
        raise InputError(
            f"{location} contains the splits {', '.join(splits)}; select the files of one: "
            f"{folder}/*{splits[0]}*.{extension}"
        )


def index_packed(
    filesystem: fs.FileSystem,
    listing: Listing,
    map_files: Map,
    index_file: Callable[[fs.FileSystem, str, str], FileIndex],
) -> ImageIndex:
    """Concatenates the indexes of all files. `index_file` takes the file system, the root and a path relative to it."""
    progress = Progress(logger, "indexed", "files", len(listing.files))
    indexes: list[FileIndex] = []
    for file_index in map_files(functools.partial(index_file, filesystem, listing.root), listing.files):
        indexes.append(file_index)
        progress.update(len(indexes))
    problems = [problem for file_index in indexes for problem in file_index.problems]
    if problems:
        raise InputError(f"{len(problems)} problems in {listing.location}: {'; '.join(problems[:3])}")
    tables = [
        table.append_column("file", pa.array(np.full(len(table), number))).select(ENTRY_SCHEMA.names)
        for number, table in enumerate(file_index.entries for file_index in indexes)
    ]
    # One chunk per column: `take`, which slices the index for every shard, costs as much as the table has chunks.
    entries = pa.concat_tables(tables).cast(ENTRY_SCHEMA).combine_chunks()
    if len(entries) == 0:
        raise InputError(f"no images in {listing.location}: its {len(listing.files)} files are empty")
    stored_names = next((file_index.class_names for file_index in indexes if file_index.class_names), None)
    stored_names = stored_names or read_names_by_id(filesystem, listing.root)
    mapping = read_class_names(filesystem, listing.root)
    return ImageIndex(entries, *name_classes(listing.location, entries, stored_names, mapping))


def read_packed(
    filesystem: fs.FileSystem,
    root: str,
    files: dict[int, ImageFile],
    entries: pa.Table,
    read_file: Callable[[pa.NativeFile, pa.Table], Iterator[bytes | Exception]],
) -> Iterator[bytes | Exception]:
    """Opens each file once and yields the images that `read_file` reads for the file's entries.

    The entries of one file must be consecutive. Raises InputError if a file is gone or has changed since it was listed.
    """
    file_numbers = entries["file"].to_numpy()
    starts = np.flatnonzero(np.diff(file_numbers, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(file_numbers)], strict=True):
        file = files[int(file_numbers[start])]
        try:
            stream = filesystem.open_input_file(f"{root}/{file.path}")
        except FileNotFoundError as error:
            raise InputError(file.gone()) from error
        with stream:
            if stream.size() != file.size:
                raise InputError(file.changed(stream.size()))
            yield from read_file(stream, entries.slice(start, stop - start))
