"""The latent dataset: what encode writes and train reads. Sole owner of its column names and of its manifest.

    latents/
        manifest.json              written last: without it, there is no dataset
        vae/                       the autoencoder itself, so that the dataset can be decoded wherever it goes
        shards/shard-00000.parquet ...
        rejected.parquet           sample_id, reason: the images that could not be read

Every shard has the columns `moments` and `moments_mirrored` (arrow.fixed_shape_tensor of float16 (2C, H, W): mean,
then standard deviation, unscaled), `label` int32 and `sample_id` string. Plain pyarrow reads shape and dtype:
`pq.read_table(shard)["moments"].combine_chunks().to_numpy_ndarray()`.

Parquet has no fast random access, and training wants rows in any order. So a node maps a copy of its own: plain .npy
files in a cache folder, made once and shared by the node's workers.
"""

import functools
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from meanflow_core.latents import MOMENTS_KIND
from pipelines import storage
from pipelines.command import InputError
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
# In a shard's schema metadata: its unreadable images, and the hash of its content.
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
    """Hash of the sorted list of image paths and sizes in bytes."""
    rows_per_shard: int
    """Images per shard: shard k holds images k rows_per_shard onwards of the sorted list."""
    moments_kind: str = MOMENTS_KIND
    """What the two halves of the moments are."""
    dtype: str = "float16"
    """Of the moments."""


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
    """Folder name per class id."""
    source: str
    """Where the images lay."""
    schema_version: int = SCHEMA_VERSION
    """Of this layout."""

    @property
    def content_sha256(self) -> str:
        """Hash of everything that training reads."""
        return hashlib.sha256("".join(self.shard_sha256).encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.recipe.moments_shape
        return channels // 2, height, width

    def to_json(self) -> str:
        """As manifest.json has it."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Reads manifest.json. Raises InputError for another schema version or a damaged file."""
        try:
            content = json.loads(text)
            version = content["schema_version"]
            if version != SCHEMA_VERSION:
                raise InputError(
                    f"{where} has schema version {version}, but this release reads version {SCHEMA_VERSION}; "
                    f"encode again, or use the release that wrote it"
                )
            recipe = content.pop("recipe")
            recipe["moments_shape"] = tuple(recipe["moments_shape"])
            return cls(recipe=EncodingRecipe(**recipe), **content)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{where} is damaged ({error}); run pipelines.encode again") from error


def shard_name(index: int) -> str:
    """Path of shard `index` in a dataset."""
    return f"shards/shard-{index:05d}.parquet"


def _tensor_array(values: np.ndarray) -> pa.Array:
    # By its storage, because from_numpy_ndarray refuses an array without rows.
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float16).reshape(-1))
    storage_array = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), values.shape[1:]), storage_array)


def shard_bytes(
    moments: np.ndarray,
    moments_mirrored: np.ndarray,
    labels: np.ndarray,
    sample_ids: Sequence[str],
    rejected: list[dict],
) -> bytes:
    """A shard as Parquet: moments float16 (N, 2C, H, W) twice, labels (N,), ids; and the rejected in its metadata."""
    table = pa.table(
        {
            "moments": _tensor_array(moments),
            "moments_mirrored": _tensor_array(moments_mirrored),
            "label": pa.array(labels, type=pa.int32()),
            "sample_id": pa.array(sample_ids, type=pa.string()),
        }
    )
    digest = hashlib.sha256(json.dumps(list(sample_ids)).encode())
    for array, dtype in ((moments, np.float16), (moments_mirrored, np.float16), (labels, np.int32)):
        digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    metadata = {REJECTED_KEY: json.dumps(rejected).encode(), SHA256_KEY: digest.hexdigest().encode()}
    table = table.replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    # Latents hardly compress (zstd saves a tenth) and dictionaries and statistics of tensors help nobody.
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_statistics=False)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardSummary:
    """What a written shard's footer says of it."""

    num_rows: int
    """Rows."""
    sha256: str
    """Hash of its moments, labels and ids."""
    rejected: list[dict]
    """Its unreadable images as {"sample_id", "reason"}."""


def shard_summary(filesystem: fs.FileSystem, path: str) -> ShardSummary:
    """Reads a shard's footer, and nothing else of it."""
    footer = pq.read_metadata(path, filesystem=filesystem)
    rejected = json.loads(footer.metadata[REJECTED_KEY])
    return ShardSummary(footer.num_rows, footer.metadata[SHA256_KEY].decode(), rejected)


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


def read_manifest(location: str) -> Manifest:
    """The manifest of a dataset. Raises InputError where there is no dataset, or it is not complete."""
    filesystem, root = storage.require_folder(location, "latent dataset")
    path = f"{root}/{MANIFEST}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
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


@dataclass(frozen=True)
class LatentDataset:
    """Random access to a dataset's rows through memory-mapped files."""

    manifest: Manifest
    """What it is."""
    moments: np.ndarray
    """(N, 2C, H, W) float16."""
    moments_mirrored: np.ndarray
    """(N, 2C, H, W) float16: of the mirror images."""
    labels: np.ndarray
    """(N,) int32."""

    @classmethod
    def open(cls, location: str, cache_dir: Path) -> "LatentDataset":
        """Maps the node's copy of a dataset, making it first where it is not there yet. Raises as `read_manifest`.

        Any number of processes of a node may call this at once: one copies, the others wait and share it.
        """
        manifest = read_manifest(location)
        key = manifest.content_sha256[:16]
        folder = cache_dir / key
        cache_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache_dir / f"{key}.lock"):
            if not folder.exists():
                _copy_shards(location, manifest, folder)
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("moments", "moments_mirrored", "label")]
        return cls(manifest, *arrays)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def rows(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moments float16 (B, 2C, H, W), of the mirror image where `mirrored` (B,), and labels int64 (B,)."""
        moments = np.where(mirrored[:, None, None, None], self.moments_mirrored[indices], self.moments[indices])
        return moments, self.labels[indices].astype(np.int64)


def _copy_shards(location: str, manifest: Manifest, folder: Path) -> None:
    filesystem, root = storage.open_storage(location)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensor = (manifest.num_samples, *manifest.recipe.moments_shape)
    layout = {
        "moments": ("float16", tensor),
        "moments_mirrored": ("float16", tensor),
        "label": ("int32", (manifest.num_samples,)),
    }
    files = {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (dtype, shape) in layout.items()
    }
    progress = Progress(logger, "copied to this node", "latents", manifest.num_samples)
    start = 0
    for index, num_rows in enumerate(manifest.shard_rows):
        table = pq.read_table(f"{root}/{shard_name(index)}", filesystem=filesystem)
        if table.num_rows != num_rows:
            raise InputError(
                f"{location}/{shard_name(index)} has {table.num_rows} rows, but its manifest says {num_rows}; "
                f"delete it and run pipelines.encode again"
            )
        if num_rows == 0:  # nothing in it could be read
            continue
        arrays = {
            "moments": table["moments"].combine_chunks().to_numpy_ndarray(),
            "moments_mirrored": table["moments_mirrored"].combine_chunks().to_numpy_ndarray(),
            "label": table["label"].to_numpy(),
        }
        _check_values(arrays, table["sample_id"], len(manifest.class_names), f"{location}/{shard_name(index)}")
        for name, array in arrays.items():
            files[name][start : start + num_rows] = array
        start += num_rows
        progress.update(start)
    for file in files.values():
        file.flush()
    os.replace(partial, folder)


def _check_values(arrays: dict[str, np.ndarray], sample_ids: pa.ChunkedArray, num_classes: int, where: str) -> None:
    """Raises InputError for moments that are not finite, or labels that are no class: here, where all of them pass."""
    bad = (arrays["label"] < 0) | (arrays["label"] >= num_classes)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{where}: the label of {sample_ids[row]} must lie in [0, {num_classes - 1}], but is "
            f"{arrays['label'][row]}; run pipelines.encode again into another folder"
        )
    for name in ("moments", "moments_mirrored"):
        finite = np.isfinite(arrays[name]).all(axis=(1, 2, 3))
        if not finite.all():
            raise InputError(
                f"{where}: the {name} of {sample_ids[int(finite.argmin())]} are not finite; the autoencoder overflowed "
                f"float16 there, or the file is damaged; run pipelines.encode again into another folder"
            )


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
