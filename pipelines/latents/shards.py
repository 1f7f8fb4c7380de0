"""The latent dataset: what encode writes and train reads. Sole owner of its column names and of its manifest.

    latents/
        manifest.json              written last: without it, there is no dataset
        recipe.json, index.parquet what is being encoded, and how; written first
        vae/                       the autoencoder itself, so that the dataset can be decoded wherever it goes
        shards/shard-00000.arrow ...
        rejected.parquet           sample_id, reason: the images that could not be read

A shard is an uncompressed Arrow IPC file of one record batch, with the columns `moments` and, unless left out,
`moments_mirrored` (arrow.fixed_shape_tensor of float16 (2C, H, W): mean, then standard deviation, unscaled), `label`
int32 and `sample_id` string. Plain pyarrow maps it into memory with shape and dtype, without a copy:
`pa.ipc.open_file(pa.memory_map(shard)).read_all()["moments"].chunk(0).to_numpy_ndarray()`.

Why not Parquet: it has no random access, which is what training wants, and keeps tensors as lists whose every value is
decoded (`tests/benchmarks/layout.py`). A node maps a copy of its own (`latent_cache`).

Schema version 1 had the same columns in Parquet, shards/shard-00000.parquet: it is read, and a node's copy of it is Arrow.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.errors import InputError

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

PARQUET_MAGIC = b"PAR1"
# In a shard's schema metadata: its length, its unreadable images, and the hash of its content.
NUM_ROWS_KEY = b"meanflow.num_rows"
REJECTED_KEY = b"meanflow.rejected"
SHA256_KEY = b"meanflow.sha256"


def _tensor_array(values: np.ndarray) -> pa.Array:
    # By its storage, because from_numpy_ndarray refuses an array without rows.
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float16).reshape(-1))
    storage_array = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), values.shape[1:]), storage_array)


def shard_bytes(
    moments: np.ndarray,
    moments_mirrored: np.ndarray | None,
    labels: np.ndarray,
    sample_ids: Sequence[str],
    rejected: list[dict],
) -> bytes:
    """A shard's file: moments float16 (N, 2C, H, W) once or twice, labels (N,), ids; the rejected in its metadata."""
    arrays = {"moments": moments} | ({} if moments_mirrored is None else {"moments_mirrored": moments_mirrored})
    columns: dict[str, pa.Array] = {name: _tensor_array(array) for name, array in arrays.items()}
    columns["label"] = pa.array(np.asarray(labels, dtype=np.int32))
    columns["sample_id"] = pa.array(sample_ids, type=pa.string())
    digest = _content_digest(list(arrays.values()), labels, sample_ids)
    batch = pa.record_batch(columns)
    batch = batch.replace_schema_metadata(
        {
            NUM_ROWS_KEY: str(len(batch)).encode(),
            SHA256_KEY: digest.encode(),
            REJECTED_KEY: json.dumps(rejected).encode(),
        }
    )
    buffer = io.BytesIO()
    # Latents hardly compress (zstd saves a tenth), and what is compressed cannot be mapped.
    with pa.ipc.new_file(buffer, batch.schema) as writer:
        writer.write_batch(batch)
    return buffer.getvalue()


def _content_digest(tensors: list[np.ndarray], labels: np.ndarray, sample_ids: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(sample_ids)).encode())
    for array in tensors:
        digest.update(np.ascontiguousarray(array, dtype=np.float16).data)
    digest.update(np.ascontiguousarray(labels, dtype=np.int32).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class ShardSummary:
    """What a written shard says of itself."""

    num_rows: int
    """Rows."""
    sha256: str
    """Hash of its moments, labels and ids."""
    rejected: list[dict]
    """Its unreadable images as {"sample_id", "reason"}."""


@dataclass(frozen=True)
class Shard:
    """A shard's content; arrays that cannot be written to."""

    moments: np.ndarray
    """(N, 2C, H, W) float16."""
    moments_mirrored: np.ndarray | None
    """The same of the mirror images, where they were encoded."""
    labels: np.ndarray
    """(N,) int32."""
    sample_ids: list[str]
    """N ids."""
    summary: ShardSummary
    """What it says of itself."""

    def content_sha256(self) -> str:
        """The hash as it should be, of what is really there."""
        tensors = [array for array in (self.moments, self.moments_mirrored) if array is not None]
        return _content_digest(tensors, self.labels, self.sample_ids)


def read_shard(filesystem: fs.FileSystem, path: str) -> Shard:
    """Reads a shard whole. Raises InputError for a file that is none."""
    with filesystem.open_input_file(path) as stream:
        return _read(stream, path)


def read_shard_bytes(content: bytes, where: str) -> Shard:
    """A shard's file that was read already, without a copy of it. Raises InputError for what is none."""
    return _read(pa.BufferReader(content), where)


def map_shard(path: Path) -> Shard:
    """A shard on a local disk, whose tensors stay there until they are looked at. Raises as `read_shard`."""
    return _read(pa.memory_map(str(path)), str(path))


def shard_summary(filesystem: fs.FileSystem, path: str) -> ShardSummary:
    """Reads what a shard says of itself, and none of its rows. Raises InputError for a file that is none."""
    with filesystem.open_input_file(path) as stream, _open_shard(stream, path) as reader:
        metadata = reader.schema.metadata
        return _summary(metadata, int(metadata[NUM_ROWS_KEY]))


def rewritten(shard: Shard, *, mirrored: bool) -> bytes:
    """A shard's file in this schema version, with its mirror images or without."""
    moments_mirrored = shard.moments_mirrored if mirrored else None
    return shard_bytes(shard.moments, moments_mirrored, shard.labels, shard.sample_ids, shard.summary.rejected)


def _read(stream: pa.NativeFile, where: str) -> Shard:
    if stream.size() >= len(PARQUET_MAGIC) and stream.read_at(len(PARQUET_MAGIC), 0) == PARQUET_MAGIC:
        try:
            table = pq.read_table(stream).combine_chunks()
            summary = _summary(table.schema.metadata, table.num_rows)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # damaged pages are an OSError
            raise InputError(f"{where} is damaged or cannot be read ({' '.join(str(error).split())})") from error
    else:
        with _open_shard(stream, where) as reader:
            table = reader.read_all()
        summary = _summary(table.schema.metadata, int(table.schema.metadata[NUM_ROWS_KEY]))
    tensors = {
        name: table[name].chunk(0).to_numpy_ndarray()
        for name in ("moments", "moments_mirrored")
        if name in table.column_names
    }
    labels = table["label"].to_numpy()
    return Shard(tensors["moments"], tensors.get("moments_mirrored"), labels, table["sample_id"].to_pylist(), summary)


@contextlib.contextmanager
def _open_shard(stream: pa.NativeFile, where: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    try:
        with pa.ipc.open_file(stream) as reader:
            yield reader
    except pa.ArrowInvalid as error:
        raise InputError(f"{where} is damaged ({error})") from error


def _summary(metadata: dict[bytes, bytes], num_rows: int) -> ShardSummary:
    return ShardSummary(num_rows, metadata[SHA256_KEY].decode(), json.loads(metadata[REJECTED_KEY]))


def rejected_bytes(rejected: list[dict]) -> bytes:
    """rejected.parquet."""
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(
            {
                "sample_id": pa.array([row["sample_id"] for row in rejected], pa.string()),
                "reason": pa.array([row["reason"] for row in rejected], pa.string()),
            }
        ),
        buffer,
    )
    return buffer.getvalue()


def shard_problems(shard: Shard, num_classes: int) -> list[str]:
    """What in a shard cannot be: moments that are not finite, labels that are no class; each with its first sample."""
    problems = []
    bad = (shard.labels < 0) | (shard.labels >= num_classes)
    if bad.any():
        row = int(bad.argmax())
        problems.append(
            f"the label of {shard.sample_ids[row]} must lie in [0, {num_classes - 1}], but is {shard.labels[row]}"
        )
    for name, array in (("moments", shard.moments), ("moments_mirrored", shard.moments_mirrored)):
        finite = np.ones(0, bool) if array is None else np.isfinite(array).all(axis=(1, 2, 3))
        if not finite.all():
            problems.append(
                f"the {name} of {shard.sample_ids[int(finite.argmin())]} are not finite, since the autoencoder overflowed "
                f"float16 or the file is damaged"
            )
    return problems
