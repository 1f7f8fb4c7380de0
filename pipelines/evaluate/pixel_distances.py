"""Pixel distances: how much samples of a class vary, and whether they copy training images."""

import torch
import torch.nn.functional as F

from meanflow_core.metrics import mean_within_class_distance, nearest_distances

PIXEL_SIZE = 64  # larger images are downsampled; this suffices to find a nearest neighbour among thousands


class PixelDistances:
    """Distances within a class and to training images, relative to those of held-out images."""

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, held_out_labels: torch.Tensor) -> None:
        self._train = downsample(train).flatten(1).float()
        pixels = downsample(held_out)
        self._held_out_diversity = _diversity(pixels, held_out_labels)
        self._held_out_nearest = self._median_nearest(pixels)

    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Metrics of uint8 images (N, H, W, 3) with labels (N,).

        diversity: mean pairwise distance within a class, divided by that of held-out images. 0 means identical images.
        It is omitted if no class has two images.
        nearest_train_ratio: median distance to the nearest training image, divided by that of held-out images. A
        value far below 1 indicates copies. Either is omitted if the held-out images score 0.
        """
        pixels, metrics = downsample(images), {}
        diversity = _diversity(pixels, labels)
        if diversity is not None and self._held_out_diversity:
            metrics["diversity"] = diversity / self._held_out_diversity
        if self._held_out_nearest:
            metrics["nearest_train_ratio"] = self._median_nearest(pixels) / self._held_out_nearest
        return metrics

    def _median_nearest(self, pixels: torch.Tensor) -> float:
        return float(nearest_distances(pixels.flatten(1), self._train).median())


def _diversity(images: torch.Tensor, labels: torch.Tensor) -> float | None:
    return mean_within_class_distance(images, labels) if bool((labels.bincount() > 1).any()) else None


def downsample(images: torch.Tensor) -> torch.Tensor:
    """Averages uint8 images (N, H, W, 3) down to PIXEL_SIZE; returns smaller ones unchanged."""
    if images.shape[1] <= PIXEL_SIZE:
        return images
    batches = [
        F.interpolate(batch.permute(0, 3, 1, 2).float(), size=(PIXEL_SIZE, PIXEL_SIZE), mode="area")
        for batch in images.split(256)
    ]
    return torch.cat(batches).round().to(torch.uint8).permute(0, 2, 3, 1)
