"""The extractor efficientnet-lite0.

B images of a batch, H W image size.
"""

from importlib.metadata import version

import torch
import torch.nn.functional as F

from meanflow_core.autoencoder import weight_hash
from pipelines.efficientnet import DEVIATION, EFFICIENTNET, MEAN, load_efficientnet
from pipelines.extractors.interface import Extractor, Features, channels_first

DISTANCE_EFFICIENTNET = "FD-EfficientNet-Lite0"
SIZE = 224  # input of Lite0: efficientnet_lite_params in TensorFlow's efficientnet_lite_builder.py


class EfficientNetLite0(Extractor):
    """The 1,280 pooled features of EfficientNet-Lite0, which was trained on ImageNet.

    The input is (x - 127) / 128, as in the weights' source: MEAN_RGB and STDDEV_RGB in TensorFlow's
    efficientnet_lite_builder.py (tensorflow/tpu, commit 22d5cab). The packages state no normalisation of their own; their
    README shows ImageNet's mean and deviation, but in a part copied from EfficientNet-B0 to B7. Measured on 372 photographs
    of clothes (alexeygrigorev/clothing-dataset-small, test, 128x128 pixels), with (x - 127) / 128 against ImageNet's:

    - variance of the first convolution's outputs, relative to the running variance that batch normalisation stored in
      training, median over channels: 0.75 against 3.68 (on 3,068 training photographs 3.84), where 1 is expected;
    - the most probable class names a garment of the photograph's folder: 0.704 against 0.621 (262 and 231 photographs);
    - mean probability of that class: 0.483 against 0.451; mean entropy: 2.49 against 2.71 nats.

    It gives no logits: an "Inception Score" of another network's classes is not comparable with anything published, and most
    data sets show few of ImageNet's classes. Class accuracy comes from a linear probe (linear_probe.py) instead.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises InputError as `load_efficientnet` does."""
        self._network = load_efficientnet().to(device)
        self._device = device
        self.identity = {
            "name": EFFICIENTNET,
            "weights_sha256": weight_hash(self._network),
            "resize": f"torch's antialiased bicubic to {SIZE}x{SIZE}, corners not aligned, clamped to [0, 255]",
            "input": "uint8 RGB, (x - 127) / 128",
            "library": f"efficientnet-lite-pytorch {version('efficientnet-lite-pytorch')}",
        }

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """See Extractor."""
        # Bicubic interpolation overshoots at edges. Pixels outside [0, 255] do not occur in images.
        resized = F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0.0, 255.0)
        maps = self._network.extract_features((resized - MEAN) / DEVIATION)  # (B, 1280, 7, 7)
        return maps.mean((2, 3))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """See Extractor."""
        return Features(self.pooled(channels_first(images, self._device).float()), None, None)
