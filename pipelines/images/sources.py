"""Where images lie, in the three forms that ImageNet comes in, as one table: an entry per image, in a fixed order.

    folders      root/<wnid>/<name>.JPEG, as ImageNet and Kaggle's CLS-LOC/train have it
    parquet      Hugging Face's: image struct<bytes, path>, label; class names in the schema's metadata
    webdataset   tars of <key>.jpg (or jpeg, png, webp) beside <key>.cls, or <key>.json with a "label"

A listing names the files, and costs a look at their folder; an index says which image lies where in them, and costs a
pass over tar headers or two columns of Parquet. Both are functions of the files alone, so any process that cuts the
same index cuts it the same way.
"""

import functools
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError

Format = Literal["folders", "parquet", "webdataset"]

IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "folders": IMAGE_EXTENSIONS,
    "parquet": (".parquet",),
    "webdataset": (".tar",),
}
READERS = 8  # files that a task reads at once
TAR_IMAGES = ("jpg", "jpeg", "png", "webp")
CLASS_NAMES_FILE = "LOC_synset_mapping.txt"
SPLIT = re.compile(r"(?:^|[-_.])(train|val|validation|test)(?=[-_.])")

# An image of the index: `file` is a row of the listing, `position` a row of a Parquet file or an offset in a tar.
ENTRY = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int32()), ("file", pa.int32()), ("position", pa.int64()), ("size", pa.int64())]
)  # fmt: skip

MapFiles = Callable[[Callable[[Any], Any], list], Iterable]
"""Applies a function to every item and gives the answers in their order: the builtin `map`, or a cluster's."""


@dataclass(frozen=True)
class Listing:
    """The files of a source, before anything in them is read."""

    location: str
    """As it was named."""
    root: str
    """Folder in the file system."""
    format: Format
    """Of the three forms."""
    files: list[str]
    """Paths under the root, sorted."""
    sizes: list[int]
    """Their sizes in bytes."""

    @property
    def sha256(self) -> str:
        """Hash of form, paths and sizes: what an encoding of this source is identified by."""
        lines = (f"{path}\t{size}\n" for path, size in zip(self.files, self.sizes, strict=True))
        return hashlib.sha256((self.format + "\n" + "".join(lines)).encode()).hexdigest()


@dataclass(frozen=True)
class ImageIndex:
    """Every image of a source, in the order of the files and of what is in them."""

    entries: pa.Table
    """Of schema ENTRY; `size` in bytes, 0 where the form does not say."""
    class_names: list[str]
    """Name per class id."""
    wnids: list[str]
    """WordNet id, or folder name, per class id; empty strings where the source has none."""

    def __len__(self) -> int:
        return self.entries.num_rows

    def to_bytes(self, source_sha256: str) -> bytes:
        """As Parquet, with the hash of the listing that it is of."""
        about = {"class_names": self.class_names, "wnids": self.wnids, "source_sha256": source_sha256}
        buffer = io.BytesIO()
        pq.write_table(self.entries.replace_schema_metadata({b"meanflow.index": json.dumps(about).encode()}), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, source_sha256: str) -> "ImageIndex | None":
        """Reads `to_bytes`; None where it is the index of other files, or none at all."""
        try:
            table = pq.read_table(io.BytesIO(content))
            about = json.loads(table.schema.metadata[b"meanflow.index"])
        except (pa.ArrowInvalid, KeyError, TypeError):
            return None
        if about["source_sha256"] != source_sha256:
            return None
        return cls(table.replace_schema_metadata(None).cast(ENTRY), about["class_names"], about["wnids"])


def list_images(location: str, form: Format | None = None) -> tuple[fs.FileSystem, Listing]:
    """Lists a source's files, telling its form by looking unless it is named.

    location: a folder, or a pattern of file names in one, such as "data/train-*.parquet".
    Raises InputError where there is nothing of that form, several forms or splits, or a class without images.
    """
    folder, pattern = location, "*"
    parent, _, name = location.rpartition("/")
    if "*" in name or (name.lower().endswith((".parquet", ".tar")) and _is_file(location)):
        folder, pattern = parent, name
    filesystem, root = storage.require_folder(folder or ".", "image folder")
    entries = [
        (entry.path[len(root) :].lstrip("/"), entry)
        for entry in filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    ]
    size_of = {
        path: entry.size
        for path, entry in entries
        if entry.type == fs.FileType.File and fnmatch(path.rsplit("/", 1)[-1], pattern)
    }
    found: list[Format] = [kind for kind in get_args(Format) if any(_is_of(path, kind) for path in size_of)]
    if form is None and len(found) > 1:
        raise InputError(f"{location} holds {' and '.join(found)}; name one by --format, or a folder of one form")
    form = form or (found[0] if found else "folders")
    files = sorted(path for path in size_of if _is_of(path, form))
    if not files:
        raise InputError(
            f"no images in {location}: wanted class folders of {', '.join(IMAGE_EXTENSIONS)} files such as "
            f"{folder}/n01440764/n01440764_18.JPEG, or .parquet files, or .tar files of a WebDataset"
            if not found
            else f"no {form} in {location}, but {' and '.join(found)}; leave --format out, or name another"
        )
    if form == "folders":
        _check_class_folders(location, files, [path for path, entry in entries if entry.type == fs.FileType.Directory])
    else:
        splits = sorted({split for path in files for split in SPLIT.findall(path.rsplit("/", 1)[-1])})
        if len(splits) > 1:
            raise InputError(
                f"{location} holds the splits {', '.join(splits)}; name the files of one: "
                f"{folder}/*{splits[0]}*{EXTENSIONS[form][0]}"
            )
    return filesystem, Listing(location, root, form, files, [size_of[path] for path in files])


def _is_file(location: str) -> bool:
    filesystem, path = storage.open_storage(location)
    return filesystem.get_file_info(path).type == fs.FileType.File


def _is_of(path: str, form: Format) -> bool:
    return path.lower().endswith(EXTENSIONS[form])


def _check_class_folders(location: str, files: list[str], folders: list[str]) -> None:
    stray = [path for path in files if "/" not in path]
    if stray:
        raise InputError(
            f"{len(stray)} images without a label lie in {location} itself, such as {stray[0]}; their folder names their "
            f"class, so put each into one"
        )
    classes = {path.split("/")[0] for path in folders if not path.startswith(".")}
    empty = sorted(classes - {path.split("/")[0] for path in files})
    if empty:
        raise InputError(
            f"{len(empty)} class folders in {location} hold no images, such as {empty[0]}; a class's id is its folder's "
            f"rank, so fill them, or delete them if these are no classes"
        )


def index_images(filesystem: fs.FileSystem, listing: Listing, map_files: MapFiles = map) -> ImageIndex:
    """The index of a listing. map_files may spread the files over a cluster.

    Raises InputError for two images of one id, images without a label, labels without an image, or classes that the
    names do not cover.
    """
    names = _read_class_names(filesystem, listing.root)
    if listing.format == "folders":
        entries, class_names, wnids = _index_folders(listing, names)
    else:
        read = _index_parquet_file if listing.format == "parquet" else _index_tar
        paths = [f"{listing.root}/{path}" for path in listing.files]
        answers = list(map_files(functools.partial(read, filesystem, listing.root), paths))
        problems = [problem for _, _, file_problems in answers for problem in file_problems]
        if problems:
            raise InputError(f"{len(problems)} problems in {listing.location}: {'; '.join(problems[:3])}")
        tables = [
            table.append_column("file", pa.array(np.full(len(table), number, np.int32))).select(ENTRY.names)
            for number, (table, _, _) in enumerate(answers)
        ]
        entries = pa.concat_tables(tables).cast(ENTRY)
        own_names = next((stated for _, stated, _ in answers if stated), None)
        class_names, wnids = _name_classes(listing, entries, own_names, names)
    if len(entries) == 0:
        raise InputError(f"no images in {listing.location}: its {len(listing.files)} files are empty")
    _refuse_duplicates(listing, entries)
    return ImageIndex(entries, class_names, wnids)


def find_images(
    location: str, form: Format | None = None, map_files: MapFiles = map
) -> tuple[fs.FileSystem, Listing, ImageIndex]:
    """`list_images`, then `index_images`."""
    filesystem, listing = list_images(location, form)
    return filesystem, listing, index_images(filesystem, listing, map_files)


def _read_class_names(filesystem: fs.FileSystem, root: str) -> dict[str, str]:
    """{wnid: name} in the file's order. Kaggle keeps the file some levels above Data/CLS-LOC/train: looks upwards."""
    folder = root
    for _ in range(4):
        path = f"{folder}/{CLASS_NAMES_FILE}"
        if filesystem.get_file_info(path).type == fs.FileType.File:
            lines = storage.read_bytes(filesystem, path).decode().splitlines()
            pairs = (line.split(" ", 1) for line in lines if " " in line)
            return {wnid: name.strip() for wnid, name in pairs}
        folder = folder.rpartition("/")[0]
        if not folder:
            break
    return {}


def _index_folders(listing: Listing, names: dict[str, str]) -> tuple[pa.Table, list[str], list[str]]:
    of_file = [path.split("/", 1)[0] for path in listing.files]
    wnids = sorted(set(of_file))
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    table = pa.table(
        {
            "sample_id": [path.rsplit(".", 1)[0] for path in listing.files],
            "label": pa.array([rank[wnid] for wnid in of_file], pa.int32()),
            "file": pa.array(np.arange(len(of_file), dtype=np.int32)),
            "position": pa.array(np.zeros(len(of_file), np.int64)),
            "size": pa.array(listing.sizes, pa.int64()),
        },
        schema=ENTRY,
    )
    return table, [names.get(wnid, wnid) for wnid in wnids], wnids


FileIndex = tuple[pa.Table, list[str] | None, list[str]]
"""A file's entries without `file`; the class names that it states; what is wrong with it."""


def _index_parquet_file(filesystem: fs.FileSystem, root: str, path: str) -> FileIndex:
    where = path[len(root) :].lstrip("/")
    with filesystem.open_input_file(path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        image = schema.field("image").type if "image" in schema.names else pa.null()
        has_image = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
        if not has_image or "label" not in schema.names:
            raise InputError(
                f"{where} must have the columns image: struct<bytes, path> and label, as Hugging Face's image datasets "
                f"do, but has {', '.join(f'{field.name}: {field.type}' for field in schema)}"
            )
        has_paths = image.get_field_index("path") >= 0
        table = parquet.read(columns=["label", "image.path"] if has_paths else ["label"])
        num_null = _null_images(parquet.metadata)
    rows = [f"{where}:{row}" for row in range(len(table))]
    ids: list[str] = rows
    if has_paths:
        stated = pc.struct_field(table["image"], "path").to_pylist()
        ids = [row if name is None else name.rsplit(".", 1)[0] for row, name in zip(rows, stated, strict=True)]
    problems = [f"{num_null} rows of {where} have a label and no image"] if num_null else []
    unlabelled = pc.or_kleene(pc.is_null(table["label"]), pc.less(table["label"], 0)).combine_chunks()
    without = pc.sum(pc.fill_null(unlabelled, True)).as_py()
    if without:
        first = ids[pc.index(pc.fill_null(unlabelled, True), True).as_py()]
        problems.append(f"{without} images of {where} have no label (null or below 0), such as {first}")
    count = len(table)
    entries = pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "label": pc.fill_null(table["label"], -1).cast(pa.int32()),
            "position": pa.array(np.arange(count, dtype=np.int64)),
            "size": pa.array(np.zeros(count, np.int64)),
        }
    )
    return entries, _stated_names(schema), problems


def _null_images(metadata: pq.FileMetaData) -> int:
    """Rows whose image.bytes are null, as far as the footer says."""
    total = 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if (
                chunk.path_in_schema == "image.bytes"
                and chunk.statistics is not None
                and chunk.statistics.has_null_count
            ):
                total += chunk.statistics.null_count
    return total


def _stated_names(schema: pa.Schema) -> list[str] | None:
    """The names of a ClassLabel, from the metadata that Hugging Face's `datasets` writes."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return None
    label = json.loads(content).get("info", {}).get("features", {}).get("label", {})
    return label.get("names")


def _index_tar(filesystem: fs.FileSystem, root: str, path: str) -> FileIndex:
    where = path[len(root) :].lstrip("/")
    samples: dict[str, dict[str, Any]] = {}
    problems = []
    # Storage that can seek skips what is between the headers; from an object store, every seek would be a request.
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    opened = filesystem.open_input_file(path) if is_local else filesystem.open_input_stream(path, buffer_size=2**23)
    try:
        with opened as stream, tarfile.open(fileobj=stream, mode="r:" if is_local else "r|") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                key, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not key:  # folders, hidden files
                    continue
                sample = samples.setdefault(folder + slash + key, {})
                extension = extension.lower()
                if extension in TAR_IMAGES:
                    if "offset" in sample:
                        problems.append(f"{folder}{slash}{key} in {where} has two images")
                    sample["offset"], sample["size"] = member.offset_data, member.size
                elif extension in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    sample[extension] = content.read()
        # Python takes a torn or damaged header for the end, without a word; the real end is a block of zeros.
        with filesystem.open_input_file(path) as stream:
            if stream.read_at(tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                problems.append(f"{where} is torn or damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        problems.append(f"{where} is no readable tar: {error}")
    rows = []
    for key, sample in samples.items():
        label = _label_of(sample)
        if "offset" not in sample:
            if label is not None:  # other files may stand for themselves
                problems.append(f"{key} in {where} has a label and no image")
            continue
        if label is None or label < 0:
            problems.append(f"{key} in {where} has no label: wanted {key}.cls with a number, or a label in {key}.json")
        label = -1 if label is None else label
        rows.append({"sample_id": key, "label": label, "position": sample["offset"], "size": sample["size"]})
    schema = pa.schema([field for field in ENTRY if field.name != "file"])
    return pa.Table.from_pylist(rows, schema=schema), None, problems


def _label_of(sample: dict[str, Any]) -> int | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        about = json.loads(sample.get("json", b"{}"))
        return int(about.get("label", about.get("cls")))
    except (ValueError, TypeError, AttributeError):
        return None


def _name_classes(
    listing: Listing, entries: pa.Table, stated: list[str] | None, mapping: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Names and wnids of a source with ids of its own, which are taken as they are."""
    needed = 1 + (pc.max(entries["label"]).as_py() or 0) if len(entries) else 0
    if stated is not None:
        if needed > len(stated):
            raise InputError(f"{listing.location} has labels up to {needed - 1}, but names {len(stated)} classes")
        # The mapping is in the order of its wnids; it may only speak where every name agrees with it.
        in_order = sorted(mapping)
        agrees = [mapping[wnid] for wnid in in_order] == stated
        return stated, in_order if agrees else [""] * len(stated)
    if needed <= len(mapping):
        in_order = sorted(mapping)
        return [mapping[wnid] for wnid in in_order], in_order
    if mapping:
        raise InputError(
            f"{listing.location} has labels up to {needed - 1}, but {CLASS_NAMES_FILE} names {len(mapping)} classes"
        )
    return [str(label) for label in range(needed)], [""] * needed


def _refuse_duplicates(listing: Listing, entries: pa.Table) -> None:
    counts = pc.value_counts(entries["sample_id"])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        some = ", ".join(repeated.field("values")[:3].to_pylist())
        raise InputError(
            f"{len(repeated)} ids in {listing.location} stand for several images, such as {some}; an id is the path "
            f"without its extension, image.path, or the key of a sample, so rename all but one"
        )


@dataclass(frozen=True)
class ImageSlice:
    """Some images of a source, and all that another process needs to read them."""

    filesystem: fs.FileSystem
    root: str
    format: Format
    files: dict[int, str]
    """The paths of those files of the listing that the entries name."""
    entries: pa.Table
    """Of schema ENTRY."""

    @classmethod
    def of(
        cls, filesystem: fs.FileSystem, listing: Listing, index: ImageIndex, rows: np.ndarray | None = None
    ) -> "ImageSlice":
        """The slice of these rows of the listing's index, int64 ascending; of all of them unless given."""
        # Taken and not sliced: a slice would be pickled with all that it is cut from.
        entries = index.entries if rows is None else index.entries.take(pa.array(rows))
        numbers = pc.unique(entries["file"]).to_pylist()
        files = {number: listing.files[number] for number in numbers}
        return cls(filesystem, listing.root, listing.format, files, entries.combine_chunks())

    def read(self) -> Iterator[bytes | Exception]:
        """Every image's bytes in their order, or why they are not there.

        Raises what storage raises where it fails: that says nothing of an image.
        """
        files = self.entries["file"].to_numpy()
        if self.format == "folders":
            # Several at once: a small file is mostly waiting, for an object store above all.
            with ThreadPoolExecutor(READERS) as readers:
                yield from readers.map(self._read_file, (self.files[int(number)] for number in files))
            return
        starts = np.flatnonzero(np.diff(files, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(files)], strict=True):
            yield from self._read_members(self.files[int(files[start])], self.entries.slice(start, stop - start))

    def _read_file(self, path: str) -> bytes | Exception:
        try:
            return storage.read_bytes(self.filesystem, f"{self.root}/{path}")
        except (FileNotFoundError, PermissionError) as error:
            return error

    def _read_members(self, path: str, entries: pa.Table) -> Iterator[bytes | Exception]:
        positions = entries["position"].to_numpy()
        with self.filesystem.open_input_file(f"{self.root}/{path}") as stream:
            if self.format == "parquet":
                yield from _read_rows(pq.ParquetFile(stream), positions)
                return
            sizes = entries["size"].to_numpy()
            # Neighbours in the tar, so one request has them all.
            first, last = int(positions.min()), int((positions + sizes).max())
            content = memoryview(stream.read_at(last - first, first))
            for position, size in zip(positions - first, sizes, strict=True):
                yield bytes(content[position : position + size])


def _read_rows(parquet: pq.ParquetFile, positions: np.ndarray) -> Iterator[bytes | Exception]:
    """image.bytes of the rows at ascending positions, reading the row groups that they are in, one at a time."""
    edges = np.cumsum([0, *(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))])
    for group in np.unique(np.searchsorted(edges, positions, side="right") - 1):
        column = pc.struct_field(parquet.read_row_group(int(group), columns=["image.bytes"])["image"], "bytes")
        inside = positions[(positions >= edges[group]) & (positions < edges[group + 1])] - edges[group]
        for content in column.take(pa.array(inside)).to_pylist():
            yield ValueError("the row holds no image bytes") if content is None else content
