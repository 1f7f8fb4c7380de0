"""The interface of a feature extractor.

B images of a batch, H W image size, D pooled features, K classes, S spatial features.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class Features:
    """Features of B images, on the extractor's device."""

    pooled: torch.Tensor
    """(B, D) float32, for the Frechet distance, precision and recall."""
    logits: torch.Tensor | None
    """(B, K) float32, for the Inception Score. None if the extractor does not classify."""
    spatial: torch.Tensor | None
    """(B, S) float32, flattened height x width x channel, for sFID. None if the extractor has none."""


class Extractor(Protocol):
    """Maps images to features."""

    identity: dict[str, str]
    """Name, weights and preprocessing. Only statistics with equal identities can be compared."""
    class_names: tuple[str, ...] | None = None
    """Class names of the logits if these are the data set's own classes, else None."""

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, D) of float pixels (B, 3, H, W) in [0, 255] on the extractor's device, with a gradient.

        Whole numbers have the same features as uint8 images. Raises InputError for images that the network does not accept.
        """

    def __call__(self, images: torch.Tensor) -> Features:
        """Computes the features of images, uint8 (B, H, W, 3) on any device, without a gradient.

        Raises ValueError for any other shape or dtype, and InputError for images that the network does not accept.
        """


def channels_first(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, 3, H, W) on the device. Raises ValueError for any other shape or dtype."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 of shape (B, H, W, 3), but got {images.dtype} {tuple(images.shape)}")
    return images.to(device).permute(0, 3, 1, 2).contiguous()


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
