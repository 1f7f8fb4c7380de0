"""The manifest of a latent dataset: what it holds and how it was made."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from pyarrow import fs

from meanflow_core.latents import MOMENTS_KIND
from pipelines import storage
from pipelines.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SCHEMA_VERSION = 2
READ_VERSIONS = (1, SCHEMA_VERSION)
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
INDEX = "index.parquet"
REJECTED = "rejected.parquet"


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


def values_per_sample(manifest: Manifest, *, mirrored: bool) -> int:
    """Numbers that a sample's moments have."""
    return (1 + mirrored) * int(np.prod(manifest.recipe.moments_shape))
