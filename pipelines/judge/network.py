"""A small classifier for one data set, a substitute for Inception.

Its features give a Frechet distance and its logits a class accuracy. The distance is not FID. A classifier that is trained
on classes alone discards the variation within a class, so a judge also regresses the factors of variation, if known.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from meanflow_core.autoencoder import to_float_images
from pipelines.errors import InputError


@dataclass(frozen=True)
class Prediction:
    """A judge's output for N images."""

    features: torch.Tensor
    """(N, 64) float32."""
    logits: torch.Tensor
    """(N, num_classes) float32."""

    @property
    def labels(self) -> torch.Tensor:
        """Predicted class labels: (N,) int64."""
        return self.logits.argmax(dim=1)


class Judge(ModelMixin, ConfigMixin):
    """Four strided convolutions and a linear layer give 64 features, which predict the class and the factors.

    image_size: side of the images in pixels; the convolutions divide it by 16, rounded up. num_factors: regression targets
    of an image, such as position and size.
    """

    @register_to_config
    def __init__(self, class_names: tuple[str, ...], image_size: int = 64, num_factors: int = 0) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
            layers += [nn.Conv2d(wide, wide, 3, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.neck = nn.Linear(widths[-1] * math.ceil(image_size / 16) ** 2, 64)
        self.head = nn.Linear(64, len(class_names))
        self.factor_head = nn.Linear(64, num_factors) if num_factors else None

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float (B, 3, H, W) in [-1, 1] -> features (B, 64), logits (B, num_classes), factors (B, num_factors)."""
        features = self.neck(self.trunk(images).flatten(1))
        activations = nn.functional.silu(features)
        factors = activations[:, :0] if self.factor_head is None else self.factor_head(activations)
        return features, self.head(activations), factors

    def require_size(self, height: int, width: int) -> None:
        """Raises InputError if images of this size are not those that the judge was trained on."""
        size = self.config.image_size
        if (height, width) != (size, size):
            raise InputError(
                f"the judge was trained on images of {size}x{size} pixels, but got {height}x{width}; give a judge that was "
                f"trained on that size"
            )

    @torch.no_grad()
    def predict(self, images: torch.Tensor, batch_size: int = 250) -> Prediction:
        """Features and logits of images uint8 (N, H, W, 3). Raises InputError for any other image size."""
        self.require_size(*images.shape[1:3])
        features, logits, _ = zip(*(self(to_float_images(batch)) for batch in images.split(batch_size)), strict=True)
        return Prediction(torch.cat(features), torch.cat(logits))


def load_judge(folder: Path) -> Judge:
    """Loads a judge from its folder. Raises InputError for a folder without one."""
    if not (folder / "config.json").is_file():
        raise InputError(f"no judge in {folder}; train one with `meanflow judge`")
    return Judge.from_pretrained(folder, low_cpu_mem_usage=False).eval()
