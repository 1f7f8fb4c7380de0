"""Mean and standard deviation of latents per channel."""

import numpy as np

from meanflow_core.latents import LatentNormalization

# On the data from which a normalization was computed, each channel has mean 0 and standard deviation 1. With Stable
# Diffusion's single factor, ImageNet's channels have standard deviations of 0.75 to 0.97 (improved MeanFlow's statistics).
MAX_MEAN, STD_RANGE = 1.0, (0.4, 2.5)


class ChannelStatistics:
    """Mean and standard deviation of latents sampled from the moments, per channel, accumulated in float64."""

    def __init__(self, num_channels: int) -> None:
        self._count = 0
        self._sum, self._squares = np.zeros(num_channels), np.zeros(num_channels)

    def add(self, moments: np.ndarray) -> None:
        """Adds moments (N, 2C, H, W). The expected square of a sample is mean^2 + std^2."""
        mean, std = np.split(moments.astype(np.float64), 2, axis=1)
        self._count += mean.size // mean.shape[1]
        self._sum += mean.sum(axis=(0, 2, 3))
        self._squares += (mean**2 + std**2).sum(axis=(0, 2, 3))

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C,) of the autoencoder's latents."""
        mean = self._sum / max(self._count, 1)
        return mean, np.sqrt(np.maximum(self._squares / max(self._count, 1) - mean**2, 0.0))

    def normalized(self, normalization: LatentNormalization) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C,) of the network's inputs."""
        mean, std = self.raw()
        scale = np.array(normalization.std)
        return (mean - np.array(normalization.mean)) / scale, std / scale

    def mismatches(self, normalization: LatentNormalization) -> list[str]:
        """Describes the channels whose normalized mean or standard deviation is far from 0 or 1."""
        mean, std = self.normalized(normalization)
        return [
            f"channel {channel} of the normalized latents has mean {mean[channel]:.2f} and standard deviation "
            f"{std[channel]:.2f} instead of about 0 and 1; check that the autoencoder and its normalization are right"
            for channel in range(len(mean))
            if abs(mean[channel]) > MAX_MEAN or not STD_RANGE[0] <= std[channel] <= STD_RANGE[1]
        ]
