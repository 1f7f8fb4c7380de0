"""Class folders: root/<wnid>/<name>.JPEG, as in ImageNet and Kaggle's CLS-LOC/train."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError
from pipelines.images.class_names import read_class_names
from pipelines.images.index import ENTRY_SCHEMA, ImageFile, ImageIndex, Listing, Map

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
NUM_THREADS = 8  # files read at once; small files are bound by latency, especially in object stores


def check_files(location: str, files: list[str], folders: list[str]) -> None:
    """Raises InputError for images outside class folders and for empty class folders."""
    stray = [path for path in files if "/" not in path]
    if stray:
        raise InputError(
            f"{location} contains {len(stray)} images without a class folder, such as {stray[0]}; move each into a "
            f"folder named after its class"
        )
    classes = {path.split("/")[0] for path in folders if not path.startswith(".")}
    empty = sorted(classes - {path.split("/")[0] for path in files})
    if empty:
        raise InputError(
            f"{len(empty)} class folders in {location} contain no images, such as {empty[0]}; class ids number the "
            f"sorted folders, so add images, or delete the folders that are not classes"
        )


def index(filesystem: fs.FileSystem, listing: Listing, map_files: Map) -> ImageIndex:
    """Builds the index from the paths alone. Class ids number the sorted folder names."""
    names = read_class_names(filesystem, listing.root)
    folder_of_file = [path.split("/", 1)[0] for path in listing.files]
    wnids = sorted(set(folder_of_file))
    class_ids = {wnid: label for label, wnid in enumerate(wnids)}
    columns = {
        "sample_id": [path.rsplit(".", 1)[0] for path in listing.files],
        "label": [class_ids[wnid] for wnid in folder_of_file],
        "file": np.arange(len(folder_of_file)),
        "position": np.zeros(len(folder_of_file), np.int64),
        "size": listing.sizes,
        "row_group": pa.nulls(len(folder_of_file)),
    }
    return ImageIndex(pa.table(columns).cast(ENTRY_SCHEMA), [names.get(wnid, wnid) for wnid in wnids], wnids)


def read(
    filesystem: fs.FileSystem, root: str, files: dict[int, ImageFile], entries: pa.Table
) -> Iterator[bytes | Exception]:
    """Yields the content of each image file, or the error if the file is gone, has changed or is not readable."""

    def read_file(number: int) -> bytes | Exception:
        file = files[number]
        try:
            content = storage.read_bytes(filesystem, f"{root}/{file.path}")
        except FileNotFoundError:
            return FileNotFoundError(file.gone())
        except PermissionError as error:
            return error
        return content if len(content) == file.size else ValueError(file.changed(len(content)))

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        yield from threads.map(read_file, entries["file"].to_pylist())
