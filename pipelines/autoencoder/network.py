"""The autoencoder's network, and the forward that its training differentiates."""

import math

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import nn

from meanflow_core.autoencoder import Autoencoder, PointAutoencoder, encode_points
from pipelines.autoencoder.job import AutoencoderJob

MAX_GROUPS = 32  # of group normalisation, as in Stable Diffusion's autoencoder
WIDTH_MULTIPLIERS = (1, 2, 4, 4, 4)  # of the levels, from pixels down; Stable Diffusion's at factor 8


def build_autoencoder(job: AutoencoderJob) -> Autoencoder:
    """An untrained autoencoder: (B, 3, S, S) -> (B, channels, S / factor, S / factor) -> (B, 3, S, S)."""
    levels = int(math.log2(job.factor)) + 1
    if job.kind == "tiny":
        blocks = (job.layers_per_block,) * (levels - 1)
        return AutoencoderTiny(
            encoder_block_out_channels=(job.width,) * levels,
            decoder_block_out_channels=(job.width,) * levels,
            latent_channels=job.channels,
            num_encoder_blocks=(1, *blocks),
            num_decoder_blocks=(*blocks, 1),
        )
    widths = tuple(job.width * multiplier for multiplier in WIDTH_MULTIPLIERS[:levels])
    if job.kind == "dc":
        blocks = (job.layers_per_block,) * levels
        return AutoencoderDC(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=blocks,
            decoder_layers_per_block=blocks,
            encoder_qkv_multiscales=((),) * levels,  # no attention
            decoder_qkv_multiscales=((),) * levels,
            latent_channels=job.channels,
        )
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=job.channels,
        layers_per_block=job.layers_per_block,
        norm_num_groups=math.gcd(job.width // 2, MAX_GROUPS),  # at least two channels per group
        sample_size=job.image_size,
        mid_block_add_attention=job.attention,
    )


class Reconstruction(nn.Module):
    """Encodes images, samples the posterior and decodes the sample: one forward, as DDP requires."""

    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images float (B, 3, S, S) in [-1, 1] -> reconstructions (B, 3, S, S), and the posterior's mean and log variance.

        Mean and log variance: (B, C, S / factor, S / factor). Latents without a posterior are their own mean, and their log
        variance is given as 0.
        """
        if isinstance(self.vae, PointAutoencoder):
            latents = encode_points(self.vae, images)
            return self.vae.decode(latents).sample, latents, torch.zeros_like(latents)
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.mean, posterior.logvar


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Moves `average` towards `module`: a = d a + (1 - d) p, with d = min(decay, (1 + step) / (10 + step)).

    step: completed steps. The smaller decay of the first steps forgets the initialisation.
    """
    effective = min(decay, (1 + step) / (10 + step))
    for averaged, parameter in zip(average.parameters(), module.parameters(), strict=True):
        averaged.lerp_(parameter, 1.0 - effective)


def learning_rate_factor(step: int, num_steps: int, warm_up_steps: int) -> float:
    """The learning rate of step `step` (from 0), relative to its peak: linear warm-up, then cosine decay to zero."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up_steps) / max(1, num_steps - warm_up_steps)))
