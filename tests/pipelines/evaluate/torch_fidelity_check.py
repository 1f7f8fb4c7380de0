"""Compares extractors and distances with torch-fidelity's: python tests/pipelines/evaluate/torch_fidelity_check.py FOLDER

Needs torch-fidelity, and a torchvision to import beside it; of that, only normalize is called. The published weights
cannot be had here, so the networks are the library's with random weights. Prints one JSON object of figures.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_fidelity
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from meanflow_core.metrics import FeatureStatistics, frechet_distance
from pipelines.errors import InputError
from pipelines.evaluate import extractors
from pipelines.evaluate.extractors import SPATIAL_CHANNELS, distance_name, open_extractor

SIZES = ((64, 64), (256, 256), (48, 80), (400, 320))

HUBCONF = """
import torch

def dinov2_vits14():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 384))
"""


class Untrained(torch_fidelity.FeatureExtractorInceptionV3):
    """The library's network as it is made, before weights are loaded."""

    def load_state_dict(self, state_dict):
        """Loads nothing."""


def random_weights(folder: Path) -> Path:
    """A file of weights with which features are neither all alike nor huge."""
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def random_images(height: int, width: int, count: int = 2) -> torch.Tensor:
    """uint8 (count, height, width, 3) of full range."""
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def tensorflow_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """float64 (B, H, W, 3) -> (B, size, size, 3): source = target * in / out, edges clamped."""

    def resized(values: np.ndarray, axis: int) -> np.ndarray:
        length = values.shape[axis]
        source = np.arange(size) * length / size
        low = np.floor(source).astype(int)
        high = np.minimum(low + 1, length - 1)
        shape = [1] * values.ndim
        shape[axis] = size
        fraction = (source - low).reshape(shape)
        return values.take(low, axis) * (1 - fraction) + values.take(high, axis) * fraction

    return resized(resized(images, 1), 2)


def first_convolution_input(extractor, images: torch.Tensor) -> torch.Tensor:
    """What the first convolution is given, (B, 3, 299, 299)."""
    seen = []

    def keep(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(inputs[0])

    with torch.nn.modules.module.register_module_forward_pre_hook(keep):
        extractor(images)
    return seen[0]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative difference by norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def check_inception(folder: Path) -> dict:
    """Features, layout, resize and range, against the library's own network."""
    path = random_weights(folder)
    extractor = open_extractor("inception", path, "cpu")
    library = torch_fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
    )
    figures: dict = {"identity": extractor.identity, "class_names": extractor.class_names, "differences": {}}
    figures["describe"] = distance_name(extractor.identity)
    extractors.PUBLISHED_WEIGHTS_SHA256 = hashlib.sha256(path.read_bytes()).hexdigest()  # as if these were they
    figures["name_of_published"] = open_extractor("inception", path, "cpu").identity["name"]
    figures["resize_errors"], figures["half_pixel_errors"] = {}, {}
    for height, width in SIZES:
        images = random_images(height, width)
        ours = extractor(images)
        kept = []
        library.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        pooled, logits = library(images.permute(0, 3, 1, 2).contiguous())
        name = f"{height}x{width}"
        figures["differences"][name] = max(relative(ours.pooled, pooled), relative(ours.logits, logits))
        seen = first_convolution_input(extractor, images).permute(0, 2, 3, 1).double().numpy()
        wanted = (tensorflow_bilinear(images.double().numpy(), 299) - 128) / 128
        figures["resize_errors"][name] = float(np.abs(seen - wanted).max())
        other = F.interpolate(images.permute(0, 3, 1, 2).double(), size=(299, 299), mode="bilinear")
        other = (other.permute(0, 2, 3, 1).numpy() - 128) / 128
        figures["half_pixel_errors"][name] = float(np.abs(other - wanted).max())

    images = random_images(64, 64)
    ours = extractor(images)
    figures["shapes"] = [list(part.shape) for part in (ours.pooled, ours.logits, ours.spatial)]
    figures["dtypes"] = [str(part.dtype) for part in (ours.pooled, ours.logits, ours.spatial)]
    figures["needs_gradient"] = ours.pooled.requires_grad or ours.spatial.requires_grad
    figures["swapped_channels"] = relative(extractor(images.flip(-1)).pooled, ours.pooled)
    figures["transposed"] = relative(extractor(images.transpose(1, 2)).pooled, ours.pooled)
    kept = []
    library.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    library(images.permute(0, 3, 1, 2))
    activations = kept[0]  # (B, 192, 17, 17)
    figures["spatial_spread"] = float(activations[:, :SPATIAL_CHANNELS].std())
    figures["spatial_matches"] = all(
        float(ours.spatial[image, (row * 17 + column) * 7 + channel]) == float(activations[image, channel, row, column])
        for image in range(2)
        for row in range(17)
        for column in range(17)
        for channel in range(7)
    )
    figures["levels"] = {
        level: first_convolution_input(extractor, torch.full((1, 8, 8, 3), level, dtype=torch.uint8)).unique().tolist()
        for level in (0, 128, 255)
    }
    torch.save({"fc.bias": torch.zeros(1008)}, folder / "other.pth")
    figures["other_weights"] = error_of("inception", folder / "other.pth")
    return figures


def check_dinov2() -> dict:
    """The library's class around a small network in place of the published ones; then without any network."""
    hub = Path(torch.hub.get_dir())
    (hub / "facebookresearch_dinov2_main").mkdir(parents=True)
    (hub / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    extractor = open_extractor("dinov2-vit-s-14", None, "cpu")
    library = torch_fidelity.FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = random_images(48, 80)
    ours = extractor(images)
    (theirs,) = library(images.permute(0, 3, 1, 2))
    torch.hub.set_dir(hub.with_name("empty"))
    return {
        "identity": extractor.identity,
        "describe": distance_name(extractor.identity),
        "difference": relative(ours.pooled, theirs),
        "shape": list(ours.pooled.shape),
        "others": [ours.logits, ours.spatial],
        "unreachable": error_of("dinov2-vit-s-14", None),
    }


def error_of(name: str, weights: Path | None) -> str:
    """The message with which opening an extractor is refused."""
    try:
        open_extractor(name, weights, "cpu")
    except InputError as error:
        return str(error)
    return "nothing was refused"


def check_frechet() -> dict[str, float]:
    """Relative differences of the distance: many samples, and fewer samples than dimensions."""
    differences = {}
    generator = torch.Generator().manual_seed(0)
    for count in (2000, 100):
        mixing = torch.randn(128, 128, generator=generator, dtype=torch.float64)
        first = torch.randn(count, 128, generator=generator, dtype=torch.float64) @ mixing
        second = torch.randn(count, 128, generator=generator, dtype=torch.float64) @ mixing * 1.1 + 0.5
        ours = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
        statistics = (fid_features_to_statistics(first), fid_features_to_statistics(second))
        theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        differences[str(count)] = abs(ours - theirs) / theirs
    return differences


def check_probabilities() -> float:
    """Relative difference of the library's Inception Score of logits and of logarithms of their probabilities."""
    logits = 3 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    scores = [isc_features_to_metric(values)[KEY_METRIC_ISC_MEAN] for values in (logits, logits.softmax(dim=1).log())]
    return abs(scores[0] - scores[1]) / scores[0]


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    figures = {
        "inception": check_inception(folder),
        "dinov2": check_dinov2(),
        "download": error_of("inception", None),
        "frechet": check_frechet(),
        "probabilities": check_probabilities(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
