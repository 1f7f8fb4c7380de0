"""What an encoding job will do: its recipe and its shards."""

from dataclasses import dataclass

import numpy as np
from diffusers import AutoencoderKL
from pyarrow import fs

from meanflow_core.autoencoder import downsampling_factor, weight_hash
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.images.decoding import CROP
from pipelines.images.sources import ImageIndex, ImageSlice, Listing
from pipelines.latents.manifest import EncodingRecipe


def _recipe(job: EncodeJob, listing: Listing, vae: AutoencoderKL) -> EncodingRecipe:
    factor = downsampling_factor(vae)
    if job.image_size % factor:
        raise InputError(f"--image-size must be a multiple of {factor} for this autoencoder, but got {job.image_size}")
    side = job.image_size // factor
    # A shard of pixels should stay below Ray Data's block size of 128 MiB.
    rows_that_fit = max(1, 96 * 2**20 // (3 * job.image_size**2))
    return EncodingRecipe(
        vae_id=job.vae,
        vae_sha256=weight_hash(vae),
        moments_shape=(2 * vae.config.latent_channels, side, side),
        image_size=job.image_size,
        crop=CROP,
        source_sha256=listing.sha256,
        rows_per_shard=min(job.rows_per_shard, rows_that_fit),
        mirrored=job.mirror,
        precision=job.precision,
        limit=job.limit,
    )


@dataclass(frozen=True)
class Plan:
    """What is to be encoded, cut into shards."""

    filesystem: fs.FileSystem
    """Where the images lie."""
    listing: Listing
    """In which files."""
    index: ImageIndex
    """Where in those."""
    recipe: EncodingRecipe
    """How they are encoded."""

    @property
    def num_images(self) -> int:
        """Images of the index that are to be encoded."""
        return min(self.recipe.limit or len(self.index), len(self.index))

    @property
    def num_shards(self) -> int:
        """Files that they make."""
        return -(-self.num_images // self.recipe.rows_per_shard)

    def rows(self, shard: int) -> np.ndarray:
        """Rows of the index that shard number `shard` holds, int64."""
        first = shard * self.recipe.rows_per_shard
        wanted = np.arange(first, min(first + self.recipe.rows_per_shard, self.num_images))
        return wanted * len(self.index) // self.num_images

    def images(self, shard: int) -> ImageSlice:
        """Its images."""
        return ImageSlice.of(self.filesystem, self.listing, self.index, self.rows(shard))
