"""The manifest of a latent dataset: its contents and how it was made.

latents/
    manifest.json               written last: a folder without it is not a dataset
    recipe.json, index.parquet  settings and images of the encoding (`pipelines.images.stored`), written first
    vae/                        the autoencoder, so that the dataset can be decoded anywhere
    shards/shard-00000.arrow ...
    rejected.parquet            sample_id and reason of each image that could not be encoded
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np
from pyarrow import fs

from meanflow_core.latents import MOMENTS_KIND
from pipelines import storage
from pipelines.errors import InputError

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
REJECTED = "rejected.parquet"


@dataclass(frozen=True, kw_only=True)
class EncodingRecipe:
    """Source and settings of an encoding. All shards of a folder belong to the same recipe."""

    vae_id: str
    """Hub id or folder of the autoencoder, as given by the user."""
    vae_sha256: str
    """Hash of the autoencoder's weights."""
    moments_shape: tuple[int, int, int]
    """(2C, H, W)."""
    image_size: int
    """Side of the cropped image in pixels."""
    crop: str
    """Name of the crop (`pipelines.images.center_crop.CROP`)."""
    source_sha256: str
    """Hash of the source's format, file paths and file sizes."""
    images_per_shard: int
    """Images per shard. Shard k begins with image k * images_per_shard of those to encode."""
    mirrored: bool = True
    """Whether mirror images are encoded too."""
    precision: str = "float32"
    """Precision of the autoencoder."""
    limit: int | None = None
    """Number of images, chosen by `pipelines.images.sampling`; None for all."""
    moments_kind: str = MOMENTS_KIND
    """Meaning of the first C and the last C channels of the moments."""
    dtype: str = "float16"
    """Data type of the moments."""


class NetworkSizes(TypedDict):
    """The network arguments that the data determines."""

    sample_size: int
    in_channels: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a complete latent dataset."""

    recipe: EncodingRecipe
    """How the dataset was encoded."""
    num_samples: int
    """Number of samples in all shards."""
    num_rejected: int
    """Number of images that could not be encoded."""
    shard_num_samples: list[int]
    """Number of samples in each shard."""
    shard_sha256: list[str]
    """Hash of each shard's moments, labels and ids."""
    class_names: list[str]
    """Name of each class id."""
    wnids: list[str]
    """WordNet id or folder name of each class id; empty strings if the source has none."""
    source: str
    """Location of the images when they were encoded."""
    schema_version: int = SCHEMA_VERSION
    """Version of the dataset's format."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shard_sha256)

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
        """sample_size, in_channels and num_classes for a network."""
        channels, size, _ = self.latent_shape
        return {"sample_size": size, "in_channels": channels, "num_classes": len(self.class_names)}

    def num_bytes(self, *, mirrored: bool) -> int:
        """Size of the float16 moments, with or without those of the mirror images."""
        return 2 * self.num_samples * (1 + mirrored) * int(np.prod(self.recipe.moments_shape))

    def to_json(self) -> str:
        """Serializes the manifest."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Reads the result of `to_json`. Raises InputError for another schema version or a damaged file."""
        try:
            content = json.loads(text)
            if content["schema_version"] != SCHEMA_VERSION:
                raise InputError(
                    f"{where} has schema version {content['schema_version']}, but this release reads version "
                    f"{SCHEMA_VERSION}; encode again into another folder, or install the release that wrote it"
                )
            recipe = content.pop("recipe")
            recipe["moments_shape"] = tuple(recipe["moments_shape"])
            return cls(recipe=EncodingRecipe(**recipe), **content)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{where} is damaged ({error}); delete it and run `meanflow encode` again") from error


def shard_name(number: int) -> str:
    """Path of a shard within the dataset."""
    return f"shards/shard-{number:05d}.arrow"


def is_complete(location: str) -> bool:
    """Whether the folder has a manifest."""
    filesystem, root = storage.open_storage(location)
    return filesystem.get_file_info(f"{root}/{MANIFEST}").type == fs.FileType.File


def read_manifest(location: str) -> Manifest:
    """Reads a dataset's manifest. Raises InputError if there is no complete dataset of this schema version."""
    filesystem, root = storage.require_folder(location, "latent dataset")
    if not is_complete(location):
        raise InputError(
            f"no {MANIFEST} in {location}; run `meanflow encode --output {location}` first, or wait until it finishes"
        )
    text = storage.read_bytes(filesystem, f"{root}/{MANIFEST}").decode()
    return Manifest.from_json(text, f"{location}/{MANIFEST}")


def write_manifest(location: str, manifest: Manifest) -> None:
    """Writes a dataset's manifest, which completes the dataset."""
    filesystem, root = storage.open_storage(location)
    storage.write_bytes(filesystem, f"{root}/{MANIFEST}", manifest.to_json().encode())
