"""The finished autoencoder: latent statistics, held-out PSNR, a grid of reconstructions, the model card, the folder."""

import io
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from PIL import Image

from meanflow_core.autoencoder import Autoencoder, encode_moments, reconstruct
from meanflow_core.grids import image_grid
from meanflow_core.metrics import peak_signal_to_noise
from pipelines import storage
from pipelines.autoencoder.batches import ImageSource
from pipelines.autoencoder.job import AutoencoderJob
from pipelines.autoencoder.record import Result
from pipelines.images.decoding import read_pixels
from pipelines.tracking.run import Run

logger = logging.getLogger(__name__)

NUM_STATISTICS_IMAGES = 4_000  # at 8x8 latents: 256,000 values per channel
GRID_CLASSES, GRID_COLUMNS = 10, 8
GRID_FILE = "reconstructions.png"


def forward_size(image_size: int) -> int:
    """Images per forward: as many pixels as 32 images of 64x64 have, because larger batches are no faster on CPUs."""
    return max(1, 32 * 64**2 // image_size**2)


@dataclass(frozen=True)
class HeldOut:
    """Held-out images in memory."""

    pixels: torch.Tensor
    """uint8 (N, S, S, 3)."""
    labels: torch.Tensor
    """int64 (N,)."""

    @classmethod
    def read(cls, source: ImageSource, job: AutoencoderJob) -> "HeldOut":
        """Reads at most `job.num_held_out` images. Raises InputError if none can be read."""
        pixels, labels = read_pixels(*source, job.image_size, job.num_held_out)
        return cls(torch.from_numpy(pixels), torch.from_numpy(labels))

    def psnr(self, vae: Autoencoder) -> float:
        """PSNR in dB over all values of the reconstructions as uint8, at the posterior's mean."""
        return peak_signal_to_noise(self._reconstructed(vae, self.pixels), self.pixels)

    def grid(self, vae: Autoencoder) -> np.ndarray:
        """Originals above their reconstructions, uint8 (H, W, 3): two rows for each of at most 10 classes."""
        classes = self.labels.unique()
        chosen = classes[torch.linspace(0, len(classes) - 1, min(len(classes), GRID_CLASSES)).long()]
        rows = []
        for label in chosen:
            originals = self.pixels[self.labels == label][:GRID_COLUMNS]
            blank = torch.full((GRID_COLUMNS - len(originals), *originals.shape[1:]), 255, dtype=torch.uint8)
            rows += [originals, blank, self._reconstructed(vae, originals), blank]
        return image_grid(torch.cat(rows).numpy(), GRID_COLUMNS)

    @staticmethod
    def _reconstructed(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        parts = pixels.split(forward_size(pixels.shape[1]))
        return torch.cat([reconstruct(vae, part.to(vae.device)).cpu() for part in parts])


def latent_statistics(vae: Autoencoder, pixels: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of posterior samples per channel, over images uint8 (N, S, S, 3).

    E z^2 = E m^2 + E s^2 for z ~ N(m, s^2) needs no samples.
    """
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for part in pixels.split(forward_size(pixels.shape[1])):
        mean, std = encode_moments(vae, part.to(vae.device)).double().chunk(2, dim=1)  # (B, C, H, W) each
        count += mean[:, 0].numel()
        total = total + mean.sum((0, 2, 3)).cpu()
        squares = squares + (mean.square() + std.square()).sum((0, 2, 3)).cpu()
    average = total / count
    return average.tolist(), (squares / count - average.square()).sqrt().tolist()


def set_normalization(vae: Autoencoder, mean: list[float], std: list[float]) -> None:
    """Writes the statistics of each channel into the config; for AutoencoderTiny, those of all channels together.

    AutoencoderTiny has a shift and a scaling factor. AutoencoderDC has a scaling factor alone, so these lists are additional
    entries. Its channels differ: on photographs, their deviations by a factor of five.
    """
    if isinstance(vae, AutoencoderTiny):
        shift = float(np.mean(mean))
        variance = np.mean(np.square(std) + np.square(np.subtract(mean, shift)))
        vae.register_to_config(shift_factor=shift, scaling_factor=float(variance**-0.5))
    else:
        vae.register_to_config(latents_mean=mean, latents_std=std)
        if isinstance(vae, AutoencoderDC):  # for programs that know nothing of the lists
            vae.register_to_config(scaling_factor=float(np.mean(np.square(std) + np.square(mean)) ** -0.5))


def publish(vae: Autoencoder, images: ImageSource, held_out: HeldOut, job: AutoencoderJob, run: Run) -> Result:
    """Measures the autoencoder and writes its folder: weights, config with statistics, grid and model card."""
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    pixels, _ = read_pixels(*images, job.image_size, NUM_STATISTICS_IMAGES)
    set_normalization(vae, *latent_statistics(vae, torch.from_numpy(pixels)))
    result = Result(
        psnr=held_out.psnr(vae),
        num_held_out=len(held_out.pixels),
        num_parameters=sum(parameter.numel() for parameter in vae.parameters()),
    )
    grid = held_out.grid(vae)
    run.log_metrics({"autoencoder/psnr": result.psnr}, job.num_steps)
    run.log_image(grid, "autoencoder/reconstructions", job.num_steps)
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "PNG")
    filesystem, output = storage.open_storage(job.output)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        for path in Path(folder).iterdir():
            storage.write_bytes(filesystem, f"{output}/{path.name}", path.read_bytes())
    storage.write_bytes(filesystem, f"{output}/{GRID_FILE}", buffer.getvalue())
    card = model_card(job, type(vae).__name__, len(images[2]), len(pixels), result)
    storage.write_bytes(filesystem, f"{output}/README.md", card.encode())
    logger.info("held-out PSNR %.2f dB over %d images; wrote %s", result.psnr, result.num_held_out, job.output)
    return result


def model_card(job: AutoencoderJob, class_name: str, num_images: int, num_statistics: int, result: Result) -> str:
    """The README.md stored with the weights. class_name: the autoencoder's class in diffusers."""
    size = job.image_size // job.factor
    perceptual = f" + {job.perceptual_weight:g} perceptual" if job.perceptual_weight else ""
    return f"""# Autoencoder

A diffusers `{class_name}`: 3x{job.image_size}x{job.image_size} -> {job.channels}x{size}x{size}, \
{result.num_parameters:,} parameters, trained by `meanflow autoencoder`. Load it with
`{class_name}.from_pretrained(FOLDER)`, or name the folder in `--vae` of `meanflow encode`.

| | |
|---|---|
| trained on | {num_images:,} images from {storage.redact(job.images)}{", with mirror images" if job.mirror else ""} |
| steps | {job.num_steps:,} of {job.batch_size} images, peak learning rate {job.learning_rate:g} |
| loss | absolute error{perceptual} + {job.kl_weight:g} KL per latent value |
| held-out PSNR | {result.psnr:.2f} dB over {result.num_held_out:,} images from {storage.redact(job.held_out_images)} |
| latent statistics | in config.json, over {num_statistics:,} training images |
| reconstructions | `{GRID_FILE}`: rows of held-out images, each above a row of their reconstructions |
| limits | Images that differ from the training images are reconstructed less well. |
| licence | not stated; the terms of the training images apply |
"""
