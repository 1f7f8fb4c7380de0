"""PixelAutoencoder: an autoencoder without weights, whose latents are the pixels themselves.

It lets a generator of small images work on pixels while every stage keeps the interface of a VAE.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Space-to-depth: pixel blocks of factor x factor become channels. The inverse is exact.

    Grey images have one image channel in the latents. `encode` takes and `decode` returns them as RGB with three equal
    channels, as every autoencoder does.

    Args:
        latent_channels: factor^2 for grey images, 3 factor^2 for RGB images.
        factor: side of a block in pixels; divides the image side.
        latents_mean, latents_std: normalisation of the latents, a value per channel. Default: 0 and 1.

    Raises ValueError for other numbers of channels.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        factor: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if latent_channels not in (factor**2, 3 * factor**2):
            raise ValueError(
                f"latent_channels must be {factor**2} (grey) or {3 * factor**2} (RGB) for blocks of {factor}x{factor} "
                f"pixels, but got {latent_channels}"
            )
        self.register_to_config(
            latents_mean=list(latents_mean or [0.0] * latent_channels),
            latents_std=list(latents_std or [1.0] * latent_channels),
        )
        self.encoder = nn.PixelUnshuffle(factor)
        self.decoder = nn.PixelShuffle(factor)
        # diffusers cannot save a model without tensors, nor find its device.
        self.register_buffer("device_marker", torch.zeros(1))

    @property
    def dtype(self) -> torch.dtype:
        """float32, whatever the model was cast to: 16 bits would not hold all 256 levels in [-1, 1]."""
        return torch.float32

    @property
    def is_grey(self) -> bool:
        """Whether the latents have one image channel instead of three."""
        return bool(self.config.latent_channels == self.config.factor**2)

    def encode(self, images: torch.Tensor) -> AutoencoderKLOutput:
        """Float images (B, 3, H, W) in [-1, 1] -> a distribution without spread, mean (B, C, H / factor, W / factor).

        A grey autoencoder takes the first channel and ignores the others. Raises RuntimeError if factor does not divide H
        and W.
        """
        latents = self.encoder(images[:, :1] if self.is_grey else images)
        distribution = DiagonalGaussianDistribution(torch.cat([latents, torch.zeros_like(latents)], 1), True)
        return AutoencoderKLOutput(latent_dist=distribution)

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        """Latents (B, C, H, W), not normalised -> float images (B, 3, factor H, factor W)."""
        images = self.decoder(latents)
        return DecoderOutput(sample=images.expand(-1, 3, -1, -1) if self.is_grey else images)
