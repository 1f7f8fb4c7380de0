"""The figure of a check: images, their decoded latents, and the decoded latents of their mirror images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

from meanflow_core.autoencoder import Autoencoder, decode_latents
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.metrics import peak_signal_to_noise
from pipelines.errors import InputError
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice, open_encoded_images


@dataclass(frozen=True)
class Sample:
    """A sample in the figure."""

    sample_id: str
    moments: np.ndarray
    """(2C, H, W) float16."""
    moments_mirrored: np.ndarray | None
    """Moments of the mirror image, if it was encoded."""


def read_images(data: str, images: str, image_size: int, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Reads the images of a dataset's samples, uint8 (size, size, 3), without listing the others.

    images: where they are now. Raises InputError if they are not those that were encoded.
    """
    filesystem, listing, index = open_encoded_images(data, images)
    row_of = {sample_id: row for row, sample_id in enumerate(index.entries["sample_id"].to_pylist())}
    rows = np.array([row_of[sample.sample_id] for sample in samples])  # ascending, since shards follow the index
    decoded = []
    for image in decode_images(ImageSlice.of(filesystem, listing, index, rows), image_size):
        if isinstance(image, Exception):
            raise InputError(f"the images in {images} are not those that were encoded: {image}")
        decoded.append(image)
    return decoded


def decode_means(vae: Autoencoder, moments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Decodes the mean of each sample's moments to uint8 (H, W, 3)."""
    normalization = LatentNormalization.from_vae_config(vae.config)
    stored = torch.from_numpy(np.stack(moments).astype(np.float32))
    no_noise = torch.zeros_like(stored.chunk(2, dim=1)[0])
    latents = sample_latents(stored, no_noise, normalization)
    return [decode_latents(vae, latent[None])[0].numpy() for latent in latents]


def draw_samples(
    samples: Sequence[Sample], images: Sequence[np.ndarray | None], vae: Autoencoder, path: Path
) -> float | None:
    """Draws samples to a PNG file. Returns the mean PSNR of the decoded latents in dB; None without images."""
    decoded = decode_means(vae, [sample.moments for sample in samples])
    psnr = [
        None if image is None else peak_signal_to_noise(torch.from_numpy(ours), torch.from_numpy(image))
        for ours, image in zip(decoded, images, strict=True)
    ]
    rows: dict[str, Sequence[np.ndarray | None]] = {"image": images, "decoded": decoded}
    mirrored = [sample.moments_mirrored for sample in samples if sample.moments_mirrored is not None]
    if mirrored:
        rows["mirrored,\ndecoded"] = decode_means(vae, mirrored)
    titles = [
        sample.sample_id.rsplit("/", 1)[-1][-22:] + ("" if value is None else f"\n{value:.1f} dB")
        for sample, value in zip(samples, psnr, strict=True)
    ]
    _draw_grid(rows, titles, path)
    known = [value for value in psnr if value is not None]
    return float(np.mean(known)) if known else None


def _draw_grid(rows: dict[str, Sequence[np.ndarray | None]], titles: Sequence[str], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (1.7 * len(titles) + 0.9, 1.85 * len(rows))
    figure, axes = pyplot.subplots(len(rows), len(titles), figsize=size, layout="constrained", squeeze=False)
    for axes_row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(axes_row, images, strict=True):
            axis.set(xticks=[], yticks=[])
            if image is not None:
                axis.imshow(image, interpolation="nearest")
        axes_row[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
