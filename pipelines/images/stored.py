"""The index file of a latent dataset: the files of its source, and the images that were encoded from each.

The file has a row per file of the source: its path, its size, and the images that were encoded from it. It replaces listing
and indexing the source again.
"""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.images.index import ENTRY_SCHEMA, ImageIndex, Listing

INDEX = "index.parquet"  # its name in a latent dataset
METADATA = b"meanflow.index"


def index_bytes(listing: Listing, index: ImageIndex) -> bytes:
    """Serializes some or all images of a listing as Parquet."""
    edges = np.searchsorted(index.entries["file"].to_numpy(), np.arange(len(listing.files) + 1))
    images = index.entries.drop_columns("file").combine_chunks().to_struct_array().combine_chunks()
    columns = {
        "file": listing.files,
        "size": listing.sizes,
        "images": pa.ListArray.from_arrays(pa.array(edges, pa.int32()), images),
    }
    metadata = {
        "location": listing.location,
        "root": listing.root,
        "format": listing.format,
        "class_names": index.class_names,
        "wnids": index.wnids,
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, metadata={METADATA: json.dumps(metadata).encode()}), buffer)
    return buffer.getvalue()


def read_index_bytes(content: bytes, where: str) -> tuple[Listing, ImageIndex]:
    """Reads the result of `index_bytes`. Raises InputError for a damaged file or one of another version."""
    try:
        table = pq.read_table(io.BytesIO(content))
        metadata = json.loads(table.schema.metadata[METADATA])
        class_names, wnids = metadata.pop("class_names"), metadata.pop("wnids")
        listing = Listing(**metadata, files=table["file"].to_pylist(), sizes=table["size"].to_pylist())
        images = table["images"].combine_chunks()
        entries = pa.Table.from_struct_array(images.flatten()).append_column("file", pc.list_parent_indices(images))
        return listing, ImageIndex(entries.select(ENTRY_SCHEMA.names).cast(ENTRY_SCHEMA), class_names, wnids)
    except (pa.ArrowException, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{where} is damaged or of another version ({error}); encode again, or give the folder of the images"
        ) from error
