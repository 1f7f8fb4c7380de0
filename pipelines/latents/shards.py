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
import functools
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from meanflow_core.latents import MOMENTS_KIND
from pipelines import storage
from pipelines.command import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
READ_VERSIONS = (1, SCHEMA_VERSION)
PARQUET_MAGIC = b"PAR1"
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
INDEX = "index.parquet"
REJECTED = "rejected.parquet"
# In a shard's schema metadata: its length, its unreadable images, and the hash of its content.
NUM_ROWS_KEY = b"meanflow.num_rows"
REJECTED_KEY = b"meanflow.rejected"
SHA256_KEY = b"meanflow.sha256"


@dataclass(frozen=True, kw_only=True)
class EncodingRecipe:
    """How a latent dataset is made, and of what. Two different recipes never share a folder."""

    vae_id: str
    """Hub id or folder that was named."""
    vae_sha256: str
    """Hash of the autoencoder's weights."""
    moments_shape: tuple[int, int, int]
    """(2C, H, W)."""
    image_size: int
    """Side of the cropped image in pixels."""
    crop: str
    """Name of the crop."""
    source_sha256: str
    """Hash of the source's form, files and their sizes in bytes."""
    rows_per_shard: int
    """Images per shard: shard k holds images k rows_per_shard onwards of the index."""
    mirrored: bool = True
    """Whether the mirror images are encoded too."""
    precision: str = "float32"
    """In which the autoencoder ran."""
    limit: int | None = None
    """Number of images, spread evenly over the index, where not all of them are encoded."""
    moments_kind: str = MOMENTS_KIND
    """What the two halves of the moments are."""
    dtype: str = "float16"
    """Of the moments."""


class NetworkSizes(TypedDict):
    """What a network's size has from the data, by the core's names."""

    sample_size: int
    in_channels: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete latent dataset."""

    recipe: EncodingRecipe
    """How it was made."""
    num_samples: int
    """Rows over all shards."""
    num_rejected: int
    """Images that could not be read."""
    shard_rows: list[int]
    """Rows of each shard."""
    shard_sha256: list[str]
    """Hash of each shard's moments, labels and ids."""
    class_names: list[str]
    """Name per class id."""
    wnids: list[str]
    """WordNet id or folder name per class id; empty where the source has none."""
    source: str
    """Where the images lay."""
    schema_version: int = SCHEMA_VERSION
    """Of this layout."""

    def shard_name(self, index: int) -> str:
        """Path of shard `index` in the dataset itself; in a node's copy it is `shard_name(index)`."""
        return shard_name(index) if self.schema_version > 1 else f"shards/shard-{index:05d}.parquet"

    @property
    def shard_remedy(self) -> str:
        """What to do about a shard that is not what it should be."""
        if self.schema_version < SCHEMA_VERSION:  # which encode does not finish
            return "put it back from the storage's older version, or encode again into another folder"
        # Encode leaves a dataset with a manifest alone. A shard that is made anew may have other bits, and a run that was
        # begun refuses those.
        return (
            f"put it back from a node's copy or the storage's older version; else delete it and {MANIFEST} and run "
            f"pipelines.encode again, which makes what is missing"
        )

    @property
    def content_sha256(self) -> str:
        """Hash of everything that training reads."""
        return hashlib.sha256("".join(self.shard_sha256).encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.recipe.moments_shape
        return channels // 2, height, width

    @property
    def network_sizes(self) -> NetworkSizes:
        """What a network's size has from the data: sample_size, in_channels, num_classes."""
        channels, size, _ = self.latent_shape
        return {"sample_size": size, "in_channels": channels, "num_classes": len(self.class_names)}

    def to_json(self) -> str:
        """As manifest.json has it."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Reads manifest.json. Raises InputError for a schema version that is not read, or a damaged file."""
        try:
            content = json.loads(text)
            version = content["schema_version"]
            if version not in READ_VERSIONS:
                raise InputError(
                    f"{where} has schema version {version}, but this release reads versions "
                    f"{' and '.join(map(str, READ_VERSIONS))}; install the release that wrote it, or encode again"
                )
            if "shard_sha256" not in content and version == 1:
                raise InputError(
                    f"{where} is of an early form of schema version 1, without hashes, which is not read; encode again into "
                    f"another folder"
                )
            recipe = content.pop("recipe")
            recipe["moments_shape"] = tuple(recipe["moments_shape"])
            return cls(recipe=EncodingRecipe(**recipe), **content)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{where} is damaged ({error}); delete it and run pipelines.encode again") from error


def shard_name(index: int) -> str:
    """Path of shard `index` in a dataset."""
    return f"shards/shard-{index:05d}.arrow"


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


def is_complete(location: str) -> bool:
    """Whether a dataset has its manifest."""
    filesystem, root = storage.open_storage(location)
    return filesystem.get_file_info(f"{root}/{MANIFEST}").type == fs.FileType.File


def read_manifest(location: str) -> Manifest:
    """The manifest of a dataset. Raises InputError where there is no dataset, or it is not complete."""
    filesystem, root = storage.require_folder(location, "latent dataset")
    path = f"{root}/{MANIFEST}"
    if not is_complete(location):
        raise InputError(
            f"no {MANIFEST} in {location}; run pipelines.encode --output {location} first, or let it finish"
        )
    return Manifest.from_json(storage.read_bytes(filesystem, path).decode(), f"{location}/{MANIFEST}")


def fetch_autoencoder(location: str, folder: Path) -> Path:
    """Copies a dataset's vae/ into a local folder, and returns it."""
    filesystem, root = storage.open_storage(location)
    folder.mkdir(parents=True, exist_ok=True)
    fs.copy_files(f"{root}/vae", str(folder), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
    return folder


def open_autoencoder(location: str, dtype: torch.dtype = torch.float32) -> "AutoencoderKL":
    """A dataset's own autoencoder, on the CPU."""
    from meanflow_core.autoencoder import load_autoencoder  # diffusers: seconds that tasks which only write can spare

    with tempfile.TemporaryDirectory() as folder:
        return load_autoencoder(str(fetch_autoencoder(location, Path(folder))), dtype)


@dataclass(frozen=True)
class LatentDataset:
    """Random access to a dataset's rows through memory-mapped shards."""

    manifest: Manifest
    """What it is."""
    moments: Sequence[np.ndarray]
    """Of every shard, float16 (n, 2C, H, W)."""
    moments_mirrored: Sequence[np.ndarray] | None
    """The same of the mirror images; None where they were not encoded, or are left out."""
    labels: np.ndarray
    """(N,) int32."""

    @classmethod
    def map(cls, folder: Path, manifest: Manifest, *, mirrored: bool = True) -> "LatentDataset":
        """Maps the shards below a local folder, which are of this schema version. Raises InputError for one that is none."""
        shards = [map_shard(folder / shard_name(number)) for number in range(len(manifest.shard_rows))]
        has_mirrored = mirrored and manifest.recipe.mirrored
        return cls(
            manifest,
            [shard.moments for shard in shards],
            [shard.moments_mirrored for shard in shards if shard.moments_mirrored is not None]
            if has_mirrored
            else None,
            np.concatenate([shard.labels for shard in shards]),
        )

    def __len__(self) -> int:
        return self.manifest.num_samples

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum([0, *self.manifest.shard_rows])

    def rows(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moments float16 (B, 2C, H, W), of the mirror image where `mirrored` (B,), and labels int64 (B,).

        Without mirror images nothing is mirrored.
        """
        shards = np.searchsorted(self._edges, indices, side="right") - 1
        offsets = indices - self._edges[shards]
        moments = np.empty((len(indices), *self.manifest.recipe.moments_shape), dtype=np.float16)
        of_kind = (self.moments, self.moments if self.moments_mirrored is None else self.moments_mirrored)
        # Row by row: every row is a run of bytes in a file of its own, and numpy copies it at the speed of memory.
        places = zip(moments, shards.tolist(), offsets.tolist(), np.asarray(mirrored, dtype=int).tolist(), strict=True)
        for target, shard, offset, is_mirrored in places:
            target[...] = of_kind[is_mirrored][shard][offset]
        return moments, self.labels[indices].astype(np.int64)


def values_per_sample(manifest: Manifest, *, mirrored: bool) -> int:
    """Numbers that a sample's moments have."""
    return (1 + mirrored) * int(np.prod(manifest.recipe.moments_shape))


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


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def rows_of_step(seed: int, step: int, global_batch_size: int, num_samples: int) -> np.ndarray:
    """Which rows make 0-based step `step`: int64 (B,), a pure function of its arguments.

    Epochs are permutations of all rows, laid end to end and cut into batches; a batch may reach into the next epoch.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, offsets = np.divmod(positions, num_samples)
    rows = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        rows[mask] = _epoch_order(seed, int(epoch), num_samples)[offsets[mask]]
    return rows
