"""The autoencoder of `--vae pixels`, normalised by the images themselves."""

import numpy as np

from meanflow_core.pixels import PixelAutoencoder
from pipelines.encode.job import EncodeJob
from pipelines.encode.plan import Plan
from pipelines.errors import InputError
from pipelines.images.decoding import read_pixels
from pipelines.images.index import Listing, Map

NUM_MEASURED_IMAGES = 1000


def build_pixel_autoencoder(job: EncodeJob, listing: Listing) -> PixelAutoencoder:
    """Builds the autoencoder of a job, not yet normalised."""
    is_grey = listing.format == "idx" if job.grey is None else job.grey
    return PixelAutoencoder((1 if is_grey else 3) * job.pixel_factor**2, job.pixel_factor)


def normalize_by_images(vae: PixelAutoencoder, plan: Plan, map_slices: Map) -> None:
    """Sets the latent normalisation to the mean and standard deviation of the pixels of NUM_MEASURED_IMAGES images.

    All channels share them, so that colours and neighbouring pixels keep their proportions.
    Raises InputError if all pixels are equal.
    """
    pixels, _ = read_pixels(
        plan.filesystem, plan.listing, plan.index, plan.recipe.image_size, NUM_MEASURED_IMAGES, map_slices
    )
    values = pixels.astype(np.float64) / 127.5 - 1.0
    if values.std() == 0.0:
        raise InputError(f"all pixels in {plan.listing.location} are equal; give images with some content")
    channels = vae.config.latent_channels
    vae.register_to_config(latents_mean=[float(values.mean())] * channels, latents_std=[float(values.std())] * channels)
