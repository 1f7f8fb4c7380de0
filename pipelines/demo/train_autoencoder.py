"""Trains the demo's autoencoder."""

import logging
import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from meanflow_core.autoencoder import to_float_images
from meanflow_core.metrics import peak_signal_to_noise
from pipelines.demo import images
from pipelines.demo.job import AutoencoderTraining
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)


def build_autoencoder() -> AutoencoderKL:
    """An untrained AutoencoderKL: 3x64x64 -> 4x8x8, no attention, under 1 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=images.IMAGE_SIZE,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int = 100) -> float:
    """PSNR in dB of decode(mode(encode(x))) over uint8 images (N, H, W, 3)."""
    x = to_float_images(pixels)
    decoded = [vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in x.split(batch_size)]
    return peak_signal_to_noise(torch.cat(decoded).clamp(-1, 1), x, peak=2.0)


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int = 100
) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of posterior samples over uint8 images (N, H, W, 3)."""
    z = torch.cat([vae.encode(to_float_images(batch)).latent_dist.sample() for batch in pixels.split(batch_size)])
    return z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist()


def train(config: AutoencoderTraining) -> tuple[AutoencoderKL, float]:
    """Trains the autoencoder and stores its latent statistics in its config. Returns it and its held-out PSNR in dB."""
    torch.manual_seed(config.seed)
    pixels = torch.from_numpy(images.draw_many("autoencoder", 0, config.num_images)[0])
    held_out = torch.from_numpy(images.draw_many("val", 0, config.num_held_out)[0])
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1.0 + math.cos(math.pi * step / config.num_steps)),
    )
    progress = Progress(logger, "autoencoder:", "steps", config.num_steps, interval_seconds=10.0)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(config.num_steps):
        if len(order) < config.batch_size:
            order = torch.randperm(len(pixels))
        indices, order = order[: config.batch_size], order[config.batch_size :]
        x = to_float_images(pixels[indices]).to(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = mse + config.l1_weight * F.l1_loss(reconstruction, x) + config.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # Pixels in [-1, 1] have a peak of 2, hence 2^2 = 4.
        progress.update(step + 1, f"batch PSNR {-10 * math.log10(mse.item() / 4):.1f} dB")
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    mean, std = latent_statistics(vae, pixels[:4000])
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return vae, held_out_psnr(vae, held_out)


def model_card(config: AutoencoderTraining, vae: AutoencoderKL, psnr: float, seconds: float) -> str:
    """The README.md stored with the weights."""
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    return f"""# The demo's autoencoder

A diffusers `AutoencoderKL` for the synthetic demo images of this project (`pipelines/demo/images.py`)
only: 3x64x64 -> 4x8x8, {num_parameters:,} parameters. Use another one for real images (`--vae stabilityai/sd-vae-ft-mse`).

| | |
|---|---|
| command | `python -m pipelines.demo.autoencoder --output DIR --num-steps {config.num_steps}` |
| trained on | {config.num_images:,} drawn images of a split that no other stage uses |
| time | {format_seconds(seconds)} on 2 CPU cores |
| held-out PSNR | {psnr:.2f} dB over {config.num_held_out:,} images of the `val` split |
| latent statistics | `latents_mean` and `latents_std` in config.json, over 4,000 training images |
| licence | Apache-2.0, like the project |
"""
