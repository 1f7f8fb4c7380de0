"""Plans an encoding job: its recipe, its shards, and which shards are missing."""

import contextlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from pyarrow import fs

from meanflow_core.autoencoder import Autoencoder, downsampling_factor, weight_hash
from pipelines import storage
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.images.center_crop import CROP
from pipelines.images.index import ImageIndex, Listing
from pipelines.images.sources import ImageSlice
from pipelines.images.stored import INDEX, index_bytes, read_index_bytes
from pipelines.latents.autoencoder import write_autoencoder
from pipelines.latents.manifest import RECIPE, EncodingRecipe, shard_name

MAX_SHARD_PIXEL_BYTES = 96 * 2**20  # below Ray Data's block size of 128 MiB


@dataclass(frozen=True)
class Plan:
    """The images to encode, divided into shards."""

    filesystem: fs.FileSystem
    """File system of the images."""
    listing: Listing
    """Their files."""
    index: ImageIndex
    """The images to encode, and their positions in the files."""
    recipe: EncodingRecipe
    """Encoding settings."""

    @property
    def num_images(self) -> int:
        """Number of images to encode."""
        return len(self.index)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_images // self.recipe.images_per_shard)

    def rows(self, shard: int) -> np.ndarray:
        """Rows of the index with a shard's images, int64 in ascending order."""
        first = shard * self.recipe.images_per_shard
        return np.arange(first, min(first + self.recipe.images_per_shard, self.num_images))

    def images(self, shard: int) -> ImageSlice:
        """Images of a shard."""
        return ImageSlice.of(self.filesystem, self.listing, self.index, self.rows(shard))

    def missing_shards(self, output: str) -> list[int]:
        """Shards that the output does not contain yet."""
        filesystem, root = storage.open_storage(output)
        infos = filesystem.get_file_info(fs.FileSelector(f"{root}/shards", allow_not_found=True))
        present = {info.path[len(root) + 1 :] for info in infos}
        return [shard for shard in range(self.num_shards) if shard_name(shard) not in present]


def make_recipe(job: EncodeJob, listing: Listing, vae: Autoencoder) -> EncodingRecipe:
    """The recipe of a job. Raises InputError if the autoencoder does not support the image size."""
    factor = downsampling_factor(vae)
    if job.crop_size % factor:
        raise InputError(f"--image-size must be a multiple of {factor} for this autoencoder, but got {job.crop_size}")
    side = job.crop_size // factor
    return EncodingRecipe(
        vae_id=storage.redact(job.vae),
        vae_sha256=weight_hash(vae),
        moments_shape=(2 * vae.config.latent_channels, side, side),
        image_size=job.crop_size,
        crop=CROP,
        source_sha256=listing.sha256,
        images_per_shard=min(job.images_per_shard, max(1, MAX_SHARD_PIXEL_BYTES // (3 * job.crop_size**2))),
        mirrored=job.mirror,
        precision=job.precision,
        limit=job.limit,
    )


def has_same_recipe(output: str, recipe: EncodingRecipe) -> bool:
    """Whether the output already has this recipe. Raises InputError if it has a different one."""
    filesystem, root = storage.open_storage(output)
    try:
        existing = json.loads(storage.read_bytes(filesystem, f"{root}/{RECIPE}"))
    except FileNotFoundError:
        return False
    requested = json.loads(json.dumps(asdict(recipe)))
    different = [name for name in requested if name != "vae_id" and existing.get(name) != requested[name]]
    if different:
        changes = "; ".join(f"{name} is {existing.get(name)}, not {requested[name]}" for name in different)
        raise InputError(f"{output} contains another encoding ({changes}); choose another --output, or delete it")
    return True


def read_index(output: str, listing: Listing) -> ImageIndex | None:
    """The images stored in the output, or None if there are none of these files."""
    filesystem, root = storage.open_storage(output)
    with contextlib.suppress(FileNotFoundError, InputError):
        stored, index = read_index_bytes(storage.read_bytes(filesystem, f"{root}/{INDEX}"), INDEX)
        return index if stored.sha256 == listing.sha256 else None
    return None


def write_plan(output: str, plan: Plan, vae: Autoencoder) -> None:
    """Writes the autoencoder and the index, then the recipe, which marks both as complete."""
    filesystem, root = storage.open_storage(output)
    write_autoencoder(output, vae)
    storage.write_bytes(filesystem, f"{root}/{INDEX}", index_bytes(plan.listing, plan.index))
    storage.write_bytes(filesystem, f"{root}/{RECIPE}", (json.dumps(asdict(plan.recipe), indent=2) + "\n").encode())
