"""Names and WordNet ids of classes."""

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError

CLASS_NAMES_FILE = "LOC_synset_mapping.txt"  # Kaggle's ImageNet: lines of "n01440764 tench, Tinca tinca"
NAMES_BY_ID_FILE = "class_names.txt"  # for packed files without names, such as IDX: line i is the name of class i


def read_class_names(filesystem: fs.FileSystem, root: str) -> dict[str, str]:
    """Reads {wnid: name} from CLASS_NAMES_FILE, sorted by wnid. Returns {} if there is no such file.

    Looks in the folder and up to three levels above, since Kaggle has the images in Data/CLS-LOC/train.
    """
    folder = root
    for _ in range(4):
        path = f"{folder}/{CLASS_NAMES_FILE}"
        if filesystem.get_file_info(path).type == fs.FileType.File:
            lines = storage.read_bytes(filesystem, path).decode().splitlines()
            return dict(sorted((line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if " " in line))
        folder = folder.rpartition("/")[0]
        if not folder:
            break
    return {}


def read_names_by_id(filesystem: fs.FileSystem, root: str) -> list[str] | None:
    """Reads the names in NAMES_BY_ID_FILE in the folder of the images, in the order of the ids. None without the file.

    Raises InputError for empty lines, equal names, and text that is not UTF-8.
    """
    path = f"{root}/{NAMES_BY_ID_FILE}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    try:
        names = [line.strip() for line in storage.read_bytes(filesystem, path).decode().rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text: {error}") from error
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"{path} must have a different name on each line, line i for class i, but has {names}")
    return names


def name_classes(
    location: str, entries: pa.Table, stored_names: list[str] | None, mapping: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Names and wnids of the classes of a source whose files store class ids.

    stored_names: names in the source's files or folder; without them, the names come from the mapping, or are the ids.
    mapping: result of `read_class_names`. The wnids come from it if its names equal the class names; else they are empty.
    """
    num_classes = 1 + pc.max(entries["label"]).as_py()
    names = stored_names or list(mapping.values()) or [str(label) for label in range(num_classes)]
    if num_classes > len(names):
        raise InputError(f"{location} has labels up to {num_classes - 1}, but names only {len(names)} classes")
    return names, list(mapping) if names == list(mapping.values()) else [""] * len(names)
