"""Feature maps of EfficientNet-Lite0, for the perceptual loss."""

import torch
from torch import nn

from pipelines.efficientnet import DEVIATION, MEAN, load_efficientnet

# The last block before each halving of the size: feature maps of 1/2, 1/4, 1/8 and 1/16 of the image's.
BLOCKS = (0, 2, 4, 10)


class EfficientNetFeatures(nn.Module):
    """The feature maps of `BLOCKS`, in evaluation mode and frozen. Gradients flow to the images."""

    def __init__(self) -> None:
        """Raises InputError as `load_efficientnet` does."""
        super().__init__()
        network = load_efficientnet()
        self._stem, self._normalization = network._conv_stem, network._bn0
        self._blocks = network._blocks[: BLOCKS[-1] + 1]
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images float32 (B, 3, H, W), nominally in [-1, 1] -> four maps (B, C, H / 2^k, W / 2^k)."""
        levels = images * 127.5 + 127.5
        x = torch.nn.functional.relu6(self._normalization(self._stem((levels - MEAN) / DEVIATION)))
        maps = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in BLOCKS:
                maps.append(x)
        return maps
