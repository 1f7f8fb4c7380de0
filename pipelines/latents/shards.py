"""Shards of a latent dataset: columns, metadata, writing and reading.

A shard is an uncompressed Arrow IPC file of one record batch with the columns

    moments            float16 tensor (2C, H, W): mean and standard deviation, not normalized
    moments_mirrored   the same for the mirror image; absent if mirror images are not encoded
    label              int32
    sample_id          string

pyarrow alone can map it into memory, with shape and dtype and without a copy:
`pa.ipc.open_file(pa.memory_map(shard)).read_all()["moments"].chunk(0).to_numpy_ndarray()`.

Parquet would be slower: it has no random access, and it decodes every value of a tensor (`tests/benchmarks/layout.py`).
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.errors import InputError

# Keys of a shard's schema metadata, which is read without reading the samples.
NUM_SAMPLES_KEY = b"meanflow.num_samples"
REJECTED_KEY = b"meanflow.rejected"
SHA256_KEY = b"meanflow.sha256"


@dataclass(frozen=True)
class ShardSummary:
    """The metadata of a shard."""

    num_samples: int
    """Number of samples."""
    sha256: str
    """Hash of the moments, labels and ids."""
    rejected: list[dict[str, str]]
    """Images of this shard that could not be encoded, as {"sample_id", "reason"}."""


@dataclass(frozen=True)
class Shard:
    """The content of a shard. The arrays are read-only."""

    moments: np.ndarray
    """(N, 2C, H, W) float16."""
    moments_mirrored: np.ndarray | None
    """Moments of the mirror images, if they were encoded."""
    labels: np.ndarray
    """(N,) int32."""
    sample_ids: list[str]
    """N ids."""
    summary: ShardSummary
    """The stored metadata."""

    def content_sha256(self) -> str:
        """Computes the hash of the content. It differs from `summary.sha256` if the file is damaged."""
        tensors = [array for array in (self.moments, self.moments_mirrored) if array is not None]
        return _content_sha256(tensors, self.labels, self.sample_ids)


def shard_bytes(
    moments: np.ndarray,
    moments_mirrored: np.ndarray | None,
    labels: np.ndarray,
    sample_ids: Sequence[str],
    rejected: list[dict[str, str]],
) -> bytes:
    """Serializes a shard: moments float16 (N, 2C, H, W), labels (N,), N ids, and the rejected images."""
    tensors = {"moments": moments} | ({} if moments_mirrored is None else {"moments_mirrored": moments_mirrored})
    columns: dict[str, pa.Array] = {name: _tensor_array(values) for name, values in tensors.items()}
    columns["label"] = pa.array(np.asarray(labels, dtype=np.int32))
    columns["sample_id"] = pa.array(sample_ids, type=pa.string())
    batch = pa.record_batch(columns).replace_schema_metadata(
        {
            NUM_SAMPLES_KEY: str(len(moments)).encode(),
            SHA256_KEY: _content_sha256(list(tensors.values()), labels, sample_ids).encode(),
            REJECTED_KEY: json.dumps(rejected).encode(),
        }
    )
    buffer = io.BytesIO()
    # Uncompressed: compressed files cannot be mapped, and zstd saves only a tenth.
    with pa.ipc.new_file(buffer, batch.schema) as writer:
        writer.write_batch(batch)
    return buffer.getvalue()


def _tensor_array(values: np.ndarray) -> pa.Array:
    # Not FixedShapeTensorArray.from_numpy_ndarray, which does not support arrays of length 0.
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float16).reshape(-1))
    storage_array = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), values.shape[1:]), storage_array)


def _content_sha256(tensors: list[np.ndarray], labels: np.ndarray, sample_ids: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(sample_ids)).encode())
    for array in tensors:
        digest.update(np.ascontiguousarray(array, dtype=np.float16).data)
    digest.update(np.ascontiguousarray(labels, dtype=np.int32).data)
    return digest.hexdigest()


def read_shard(filesystem: fs.FileSystem, path: str) -> Shard:
    """Reads a whole shard. Raises InputError for a damaged file."""
    with filesystem.open_input_file(path) as stream:
        return _read(stream, path)


def read_shard_bytes(content: bytes, where: str) -> Shard:
    """Reads a shard from memory without copying it. Raises InputError for a damaged file, named `where` in the message."""
    return _read(pa.BufferReader(content), where)


def map_shard(path: Path) -> Shard:
    """Maps a shard on a local disk into memory. Raises InputError for a damaged file."""
    return _read(pa.memory_map(str(path)), str(path))


def read_summary(filesystem: fs.FileSystem, path: str) -> ShardSummary:
    """Reads the metadata of a shard, but none of its samples. Raises InputError for a damaged file."""
    with filesystem.open_input_file(path) as stream, _open(stream, path) as reader:
        return _summary(reader.schema.metadata)


def _read(stream: pa.NativeFile, where: str) -> Shard:
    with _open(stream, where) as reader:
        table = reader.read_all()
    tensors = {
        name: table[name].chunk(0).to_numpy_ndarray()
        for name in ("moments", "moments_mirrored")
        if name in table.column_names
    }
    return Shard(
        tensors["moments"],
        tensors.get("moments_mirrored"),
        table["label"].to_numpy(),
        table["sample_id"].to_pylist(),
        _summary(table.schema.metadata),
    )


@contextlib.contextmanager
def _open(stream: pa.NativeFile, where: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    try:
        with pa.ipc.open_file(stream) as reader:
            yield reader
    except pa.ArrowInvalid as error:
        raise InputError(f"{where} is damaged ({error})") from error


def _summary(metadata: dict[bytes, bytes]) -> ShardSummary:
    return ShardSummary(
        int(metadata[NUM_SAMPLES_KEY]), metadata[SHA256_KEY].decode(), json.loads(metadata[REJECTED_KEY])
    )


def invalid_values(shard: Shard, num_classes: int) -> list[str]:
    """Describes labels out of range and moments that are not finite, each with its first sample."""
    problems = []
    is_invalid = (shard.labels < 0) | (shard.labels >= num_classes)
    if is_invalid.any():
        row = int(is_invalid.argmax())
        problems.append(
            f"label of {shard.sample_ids[row]} must be in [0, {num_classes - 1}], but is {shard.labels[row]}"
        )
    for name, array in (("moments", shard.moments), ("moments_mirrored", shard.moments_mirrored)):
        is_finite = np.ones(0, bool) if array is None else np.isfinite(array).all(axis=(1, 2, 3))
        if not is_finite.all():
            problems.append(
                f"{name} of {shard.sample_ids[int(is_finite.argmin())]} are not finite: the autoencoder overflowed float16, "
                f"or the file is damaged"
            )
    return problems
