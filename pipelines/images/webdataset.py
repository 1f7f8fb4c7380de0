"""WebDataset tars: <key>.jpg (or jpeg, png, webp) with <key>.cls, or with <key>.json that has a "label"."""

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.images.index import ENTRY_SCHEMA, ImageFile, ImageIndex, Listing, Map
from pipelines.images.packed_files import FileIndex, check_one_split, index_packed, read_packed

EXTENSIONS = (".tar",)
check_files = check_one_split
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
STREAM_BUFFER_BYTES = 2**23
MAX_GAP_BYTES = 2**20  # an object store transfers about 1 MiB in the time that another request takes


def index(filesystem: fs.FileSystem, listing: Listing, map_files: Map) -> ImageIndex:
    """Builds the index from the tar headers and labels."""
    return index_packed(filesystem, listing, map_files, _index_file)


def read(
    filesystem: fs.FileSystem, root: str, files: dict[int, ImageFile], entries: pa.Table
) -> Iterator[bytes | Exception]:
    """Yields the bytes of each image. Reads images with small gaps between them in one request, and skips large gaps."""
    return read_packed(filesystem, root, files, entries, _read_file)


def _index_file(filesystem: fs.FileSystem, root: str, path: str) -> FileIndex:
    samples, problems = _read_members(filesystem, root, path)
    rows = []
    for key, sample in samples.items():
        label = _label(sample)
        if "offset" in sample:
            rows.append({"sample_id": key, "label": label, "position": sample["offset"], "size": sample["size"]})
            if label < 0:
                problems.append(f"{key} in {path} has no label: add {key}.cls with a number, or a label to {key}.json")
        elif label >= 0:  # files with neither an image nor a label are not a sample, and are ignored
            problems.append(f"{key} in {path} has a label but no image")
    schema = pa.schema([field for field in ENTRY_SCHEMA if field.name != "file"])
    return FileIndex(pa.Table.from_pylist(rows, schema=schema), problems)


def _read_members(filesystem: fs.FileSystem, root: str, path: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """{key: {"offset", "size", "cls", "json"}} of a tar, and problems."""
    samples: dict[str, dict[str, Any]] = {}
    problems = []
    # tarfile seeks from header to header in local files. Object stores are streamed, since each seek would be a request.
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    full_path = f"{root}/{path}"
    opened = (
        filesystem.open_input_file(full_path)
        if is_local
        else filesystem.open_input_stream(full_path, buffer_size=STREAM_BUFFER_BYTES)
    )
    try:
        with opened as stream, tarfile.open(fileobj=stream, mode="r:" if is_local else "r|") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not stem:  # folders and hidden files
                    continue
                key = folder + slash + stem
                sample = samples.setdefault(key, {})
                extension = extension.lower()
                if extension in IMAGE_MEMBERS:
                    if "offset" in sample:
                        problems.append(f"{key} in {path} has two images")
                    sample["offset"], sample["size"] = member.offset_data, member.size
                elif extension in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    sample[extension] = content.read()
        # tarfile mistakes a damaged header for the end of the file. The real end is a block of zeros.
        with filesystem.open_input_file(full_path) as stream:
            if stream.read_at(tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                problems.append(f"{path} is truncated or damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        problems.append(f"{path} is not a readable tar: {error}")
    return samples, problems


def _label(sample: dict[str, Any]) -> int:
    """The class id; -1 if there is none."""
    try:
        if "cls" in sample:
            return int(sample["cls"])
        metadata = json.loads(sample.get("json", b"{}"))
        return int(metadata.get("label", metadata.get("cls")))
    except (ValueError, TypeError, AttributeError):
        return -1


def _read_file(stream: pa.NativeFile, entries: pa.Table) -> Iterator[bytes | Exception]:
    starts = entries["position"].to_numpy()
    stops = starts + entries["size"].to_numpy()
    gaps = np.flatnonzero(abs(starts[1:] - stops[:-1]) > MAX_GAP_BYTES) + 1
    for rows in np.split(np.arange(len(starts)), gaps):
        first = starts[rows].min()  # samples are in the order of their first files, which need not be the images
        content = memoryview(stream.read_at(int(stops[rows].max() - first), int(first)))
        for row in rows:
            yield bytes(content[starts[row] - first : stops[row] - first])
