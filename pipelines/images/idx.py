"""IDX files of MNIST, Fashion-MNIST and EMNIST: train-images-idx3-ubyte with train-labels-idx1-ubyte, or both with .gz.

EMNIST's images are stored transposed, and are read as they are stored.
"""

import functools
import gzip
import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError
from pipelines.images.index import ImageFile, ImageIndex, Listing, Map
from pipelines.images.packed_files import FileIndex, index_packed, read_packed

EXTENSIONS = ("idx3-ubyte", "idx3-ubyte.gz", "idx1-ubyte", "idx1-ubyte.gz")
# The header: two zero bytes, 8 for uint8 values, the number of dimensions, then each dimension. All are big-endian.
IMAGES_MAGIC, IMAGES_HEADER = 0x00000803, struct.Struct(">IIII")  # magic, images, rows, columns
GZIP_MAGIC = b"\x1f\x8b"
LABELS_MAGIC, LABELS_HEADER = 0x00000801, struct.Struct(">II")  # magic, labels


def check_files(location: str, files: list[str], folders: list[str]) -> None:
    """Raises InputError for several splits, images without labels and labels without images."""
    images = [path for path in files if _is_images(path)]
    labels = [path for path in files if not _is_images(path)]
    without_labels = sorted({*images} - {_other(path) for path in labels})
    without_images = sorted({*labels} - {_other(path) for path in images})
    if without_labels:
        raise InputError(f"{location} contains {without_labels[0]}, but not its labels {_other(without_labels[0])}")
    if without_images:
        raise InputError(f"{location} contains {without_images[0]}, but not its images {_other(without_images[0])}")
    if len(images) > len({path.removesuffix(".gz") for path in images}):
        raise InputError(f"{location} contains {images[0]} both packed and unpacked; delete one of the two pairs")
    if len(images) > 1:
        folder = location.rpartition("/")[0] if "*" in location else location
        prefix = images[0].rpartition("images")[0]
        raise InputError(
            f"{location} contains several sets of images, {', '.join(images)}; select the files of one: {folder}/{prefix}*"
        )


def index(filesystem: fs.FileSystem, listing: Listing, map_files: Map) -> ImageIndex:
    """Builds the index from the labels. Raises InputError for files that are cut short, or of another form."""
    return index_packed(filesystem, listing, map_files, _index_file)


def read(
    filesystem: fs.FileSystem, root: str, files: dict[int, ImageFile], entries: pa.Table
) -> Iterator[bytes | Exception]:
    """Yields each image as the bytes of a grey PGM file, which contains the pixels unchanged."""
    return read_packed(filesystem, root, files, entries, _read_file)


def _is_images(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith("idx3-ubyte")


def _other(path: str) -> str:
    """The path of the labels of an images file, and the reverse."""
    swaps = {"images": "labels", "labels": "images", "idx3": "idx1", "idx1": "idx3"}
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub("images|labels|idx3|idx1", lambda match: swaps[match.group()], name)


def _index_file(filesystem: fs.FileSystem, root: str, path: str) -> FileIndex:
    if not _is_images(path):  # it is read together with its images
        return FileIndex(_entries(path, np.zeros(0, np.int32), 0), [])
    content = _decompressed(storage.read_bytes(filesystem, f"{root}/{path}"), path)
    num_images, height, width = _read_header(content, path)
    labels = _read_labels(filesystem, root, _other(path))
    if len(labels) != num_images:
        raise InputError(f"{path} has {num_images} images, but {_other(path)} has {len(labels)} labels")
    return FileIndex(_entries(path, labels, height * width), [])


def _entries(path: str, labels: np.ndarray, num_bytes: int) -> pa.Table:
    """One row per image. Ids are such as train:7, from train-images-idx3-ubyte.gz."""
    split = path.rpartition("images")[0].rstrip("-._") or "images"
    return pa.table(
        {
            "sample_id": pa.array([f"{split}:{row}" for row in range(len(labels))], pa.string()),
            "label": labels.astype(np.int32),
            "position": np.arange(len(labels)),
            "size": np.full(len(labels), num_bytes, np.int64),
            "row_group": pa.nulls(len(labels), pa.int32()),
        }
    )


def _decompressed(content: bytes, path: str) -> bytes:
    if not path.lower().endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut short ({error}); download it again") from error


def _read_header(content: bytes, path: str) -> tuple[int, int, int]:
    """Returns the number of images, their height and their width. Raises InputError for a file of another form."""
    if len(content) < IMAGES_HEADER.size:
        raise InputError(f"{path} is cut short: it has {len(content)} bytes, less than the header of an IDX file")
    magic, num_images, height, width = IMAGES_HEADER.unpack_from(content)
    if magic != IMAGES_MAGIC:
        raise InputError(f"{path} must begin with {IMAGES_MAGIC:#010x} (uint8 images), but begins with {magic:#010x}")
    _check_length(path, len(content), IMAGES_HEADER.size + num_images * height * width)
    return num_images, height, width


def _read_labels(filesystem: fs.FileSystem, root: str, path: str) -> np.ndarray:
    """Returns the labels, uint8 (N,)."""
    content = _decompressed(storage.read_bytes(filesystem, f"{root}/{path}"), path)
    if len(content) < LABELS_HEADER.size:
        raise InputError(f"{path} is cut short: it has {len(content)} bytes, less than the header of an IDX file")
    magic, num_labels = LABELS_HEADER.unpack_from(content)
    if magic != LABELS_MAGIC:
        raise InputError(f"{path} must begin with {LABELS_MAGIC:#010x} (uint8 labels), but begins with {magic:#010x}")
    _check_length(path, len(content), LABELS_HEADER.size + num_labels)
    return np.frombuffer(content, np.uint8, num_labels, LABELS_HEADER.size)


def _check_length(path: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise InputError(
            f"{path} is cut short or damaged: its header announces {expected} bytes, but it has {actual}; download it again"
        )


def _read_file(stream: pa.NativeFile, entries: pa.Table) -> Iterator[bytes | Exception]:
    first = stream.read(2)
    stream.seek(0)
    pixels = io.BytesIO(_decompressed_once(stream.readall())) if first == GZIP_MAGIC else stream
    _, _, height, width = IMAGES_HEADER.unpack(pixels.read(IMAGES_HEADER.size))
    header = b"P5 %d %d 255\n" % (width, height)
    for position in entries["position"].to_pylist():
        pixels.seek(IMAGES_HEADER.size + position * height * width)
        yield header + pixels.read(height * width)


@functools.lru_cache(maxsize=1)  # slices of one file follow each other, and gzip can only be read from the beginning
def _decompressed_once(content: bytes) -> bytes:
    return gzip.decompress(content)
