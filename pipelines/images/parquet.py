"""Parquet files of Hugging Face image datasets: columns image struct<bytes, path> and label."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.images.index import ImageFile, ImageIndex, Listing, Map
from pipelines.images.packed_files import FileIndex, check_one_split, index_packed, read_packed

EXTENSIONS = (".parquet",)
check_files = check_one_split


def index(filesystem: fs.FileSystem, listing: Listing, map_files: Map) -> ImageIndex:
    """Builds the index from the label and path columns, without reading the images."""
    return index_packed(filesystem, listing, map_files, _index_file)


def read(
    filesystem: fs.FileSystem, root: str, files: dict[int, ImageFile], entries: pa.Table
) -> Iterator[bytes | Exception]:
    """Yields the image.bytes of each entry, or an error if they are null.

    Reads only the row groups that contain entries, one at a time, and of these only the image column.
    """
    return read_packed(filesystem, root, files, entries, _read_file)


def _index_file(filesystem: fs.FileSystem, root: str, path: str) -> FileIndex:
    with filesystem.open_input_file(f"{root}/{path}") as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        image = schema.field("image").type if "image" in schema.names else pa.null()
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0 or "label" not in schema.names:
            raise InputError(
                f"{path} must have the columns image: struct<bytes, path> and label, as Hugging Face's image datasets "
                f"do, but has {', '.join(f'{field.name}: {field.type}' for field in schema)}"
            )
        has_paths = image.get_field_index("path") >= 0
        group_sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        table = parquet.read(columns=["label", "image.path"] if has_paths else ["label"])
    paths = pc.struct_field(table["image"], "path").to_pylist() if has_paths else [None] * len(table)
    ids = [f"{path}:{row}" if name is None else name.rsplit(".", 1)[0] for row, name in enumerate(paths)]
    labels = pc.fill_null(table["label"], -1).cast(pa.int32())
    unlabelled = np.flatnonzero(labels.to_numpy() < 0)
    problems = []
    if len(unlabelled):
        problems.append(
            f"{len(unlabelled)} images of {path} have no label (null or below 0), such as {ids[unlabelled[0]]}"
        )
    columns = {
        "sample_id": pa.array(ids, pa.string()),
        "label": labels,
        "position": np.arange(len(table)),
        "size": np.zeros(len(table), np.int64),
        "row_group": np.repeat(np.arange(len(group_sizes)), group_sizes),
    }
    return FileIndex(pa.table(columns), problems, _class_names(schema))


def _class_names(schema: pa.Schema) -> list[str] | None:
    """Names of a ClassLabel, from the schema metadata that Hugging Face's `datasets` writes."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return metadata.get("info", {}).get("features", {}).get("label", {}).get("names")


def _read_file(stream: pa.NativeFile, entries: pa.Table) -> Iterator[bytes | Exception]:
    parquet, positions, groups = pq.ParquetFile(stream), entries["position"].to_numpy(), entries["row_group"].to_numpy()
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    for group in np.unique(groups):
        column = pc.struct_field(parquet.read_row_group(int(group), columns=["image.bytes"])["image"], "bytes")
        inside = positions[groups == group] - sum(sizes[:group])
        for content in column.take(pa.array(inside)).to_pylist():
            yield ValueError("image.bytes is null") if content is None else content
