"""Three terms and their shapes: image -> moments -> latent.

    image    (B, 3, 8H, 8W)  pixels, uint8, or float in [-1, 1]
    moments  (B, 2C, H, W)   mean and standard deviation of the VAE's posterior, unscaled; stored by the encode stage
    latent   (B, C, H, W)    a sample of the posterior, normalised; the network's input

Training and sampling must use the same normalisation, so both read it from the config of the generator's VAE
(`scaling_factor` and `shift_factor`, or `latents_mean` and `latents_std`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Scaling factor of Stable Diffusion's VAEs (Rombach et al. 2022; configs of sd-vae-ft-mse and sd-vae-ft-ema).
SD_SCALING_FACTOR = 0.18215
# Per-channel statistics of sd-vae-ft-mse's raw latents on ImageNet (improved MeanFlow's released code).
SD_VAE_FT_MSE_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
SD_VAE_FT_MSE_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)

MOMENTS_KIND = "mean_std"  # written to latent datasets


@dataclass(frozen=True, kw_only=True)
class LatentNormalization:
    """latent = (raw - mean) / std, per channel."""

    mean: tuple[float, ...]
    """One value per channel."""
    std: tuple[float, ...]
    """One value above 0 per channel."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean and std need one value per channel, but got {len(self.mean)} and {len(self.std)}")
        if not all(0.0 < value < math.inf for value in self.std) or not all(
            math.isfinite(value) for value in self.mean
        ):
            raise ValueError(
                f"latent means must be finite and standard deviations above 0, but got {self.mean} and {self.std}"
            )

    @classmethod
    def from_vae_config(cls, config: Mapping[str, Any]) -> "LatentNormalization":
        """Reads an autoencoder's config: `latents_mean` and `latents_std` if present, else shift and scale.

        Raises ValueError if the config has neither the two lists nor a scale, or only one of the lists.
        """
        channels = int(config["latent_channels"])
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if (mean is None) != (std is None):
            raise ValueError(
                "the VAE's config must have both latents_mean and latents_std or neither, but has one of them"
            )
        if mean is not None and std is not None:
            if len(mean) != channels:
                raise ValueError(
                    f"latents_mean must have {channels} values, one per latent channel of the VAE, but has {len(mean)}"
                )
            return cls(mean=tuple(mean), std=tuple(std))
        scale = config.get("scaling_factor")
        if not scale:
            raise ValueError(
                f"the VAE's config needs latents_mean and latents_std, or a scaling_factor other than 0, but has {scale}"
            )
        shift = config.get("shift_factor") or 0.0
        return cls(mean=(float(shift),) * channels, std=(1.0 / float(scale),) * channels)

    def _per_channel(self, values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        if like.shape[1] != len(values):
            raise ValueError(f"latents must have {len(values)} channels, but got shape {tuple(like.shape)}")
        return _on_device(values, like.dtype, like.device).view(1, -1, 1, 1)

    def normalize(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw VAE latents (B, C, H, W) -> latents of about unit variance, in the same shape and dtype."""
        return (raw - self._per_channel(self.mean, raw)) / self._per_channel(self.std, raw)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`: the input of the VAE's decoder."""
        return latents * self._per_channel(self.std, latents) + self._per_channel(self.mean, latents)


@lru_cache(maxsize=64)  # copying from host to device waits for the device, which is too slow for every training pass
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
        return torch.tensor(values, dtype=dtype, device=device)


def sample_latents(
    moments: torch.Tensor, posterior_noise: torch.Tensor, normalization: LatentNormalization
) -> torch.Tensor:
    """Samples latents, float32 (B, C, H, W), from stored moments.

    moments: (B, 2C, H, W), any float dtype, mean then standard deviation. posterior_noise: (B, C, H, W), standard
    normal. Raises ValueError for mismatched shapes.
    """
    mean, std = moments.float().chunk(2, dim=1)
    if mean.shape != posterior_noise.shape:
        raise ValueError(
            f"moments of shape {tuple(moments.shape)} need posterior noise of shape {tuple(mean.shape)}, "
            f"but got {tuple(posterior_noise.shape)}"
        )
    return normalization.normalize(mean + std * posterior_noise)
