"""A small classifier whose eyes measure generated images: its features give a Frechet distance, its answers an accuracy.

It is not Inception, and its distance is not FID: it knows the classes of one small data set and nothing else.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from meanflow_core.autoencoder import to_float_images
from pipelines.command import InputError


@dataclass(frozen=True)
class Judgement:
    """What a judge sees in N images."""

    features: torch.Tensor
    """(N, 64) float32."""
    predictions: torch.Tensor
    """(N,) int64: class ids."""


class Judge(ModelMixin, ConfigMixin):
    """Four strided convolutions, a global mean, and a linear layer: images of any size to 64 features and classes."""

    @register_to_config
    def __init__(self, class_names: tuple[str, ...], image_size: int = 64) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
            layers += [nn.Conv2d(wide, wide, 3, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], len(class_names))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float (B, 3, H, W) in [-1, 1] -> features (B, 64) and logits (B, classes)."""
        features = self.trunk(images).mean(dim=(2, 3))
        return features, self.head(features)

    @torch.no_grad()
    def look_at(self, images: torch.Tensor, batch_size: int = 250) -> Judgement:
        """Images uint8 (N, H, W, 3). Raises InputError for images of another size than the judge was trained on."""
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            raise InputError(f"the judge sees images of {size}x{size}, but got {images.shape[1]}x{images.shape[2]}")
        features, logits = zip(*(self(to_float_images(batch)) for batch in images.split(batch_size)), strict=True)
        return Judgement(torch.cat(features), torch.cat(logits).argmax(dim=1))


def load_judge(folder: Path) -> Judge:
    """Opens a judge's folder. Raises InputError where there is none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"no judge in {folder}; python -m pipelines.demo.judge trains one")
    return Judge.from_pretrained(folder, low_cpu_mem_usage=False).eval()
