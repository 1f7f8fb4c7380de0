"""Distances between pixels: whether samples of a class vary, and whether they copy the training images."""

import torch
import torch.nn.functional as F

from meanflow_core.metrics import mean_within_class_distance, nearest_distances

PIXEL_SIZE = 64  # side to which images are shrunk: a nearest neighbour among thousands needs no more


class PixelDistances:
    """How much images vary within a class, and how near they come to training images, beside what held-out images do."""

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, held_out_labels: torch.Tensor) -> None:
        self._train = shrunk(train).flatten(1).float()
        small = shrunk(held_out)
        self._held_out_diversity = _variety(small, held_out_labels)
        self._held_out_nearest = float(nearest_distances(small.flatten(1), self._train).median())

    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Of uint8 images (N, H, W, 3) that ought to be of classes (N,).

        diversity: mean pairwise distance within a class, over that of held-out images; 0 is one image only.
        nearest_train_ratio: median distance to the nearest training image, over that of held-out images; far below 1 is
        copying. What cannot be told is left out: diversity without a class of two images, either figure where held-out
        images score 0.
        """
        small, found = shrunk(images), {}
        variety = _variety(small, labels)
        if variety is not None and self._held_out_diversity:
            found["diversity"] = variety / self._held_out_diversity
        if self._held_out_nearest:
            nearest = float(nearest_distances(small.flatten(1), self._train).median())
            found["nearest_train_ratio"] = nearest / self._held_out_nearest
        return found


def _variety(images: torch.Tensor, labels: torch.Tensor) -> float | None:
    return mean_within_class_distance(images, labels) if bool((labels.bincount() > 1).any()) else None


def shrunk(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (N, H, W, 3), averaged down to PIXEL_SIZE where they are larger: distances keep their order."""
    if images.shape[1] <= PIXEL_SIZE:
        return images
    small = [
        F.interpolate(part.permute(0, 3, 1, 2).float(), size=(PIXEL_SIZE, PIXEL_SIZE), mode="area")
        for part in images.split(256)
    ]
    return torch.cat(small).round().to(torch.uint8).permute(0, 2, 3, 1)
