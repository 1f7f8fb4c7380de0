"""Compares extractors and distances with torch-fidelity's. test_extractors.py runs it where torch-fidelity can be imported.

The published weights are not available in the tests, so the library's networks have random weights.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from meanflow_core.metrics import FeatureStatistics, frechet_distance
from pipelines.errors import InputError
from pipelines.extractors import opening as extractors
from pipelines.extractors.opening import SPATIAL_CHANNELS, distance_name, open_extractor

HUBCONF = """
import torch

def dinov2_vits14():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 384))
"""


class Untrained(torch_fidelity.FeatureExtractorInceptionV3):
    """The library's network without its weights."""

    def load_state_dict(self, state_dict):
        """Loads nothing."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights that give small features, different for each image."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="module")
def inception(weights):
    return open_extractor("inception", weights, "cpu")


@pytest.fixture
def dinov2(tmp_path):
    torch.hub.set_dir(tmp_path)
    (tmp_path / "facebookresearch_dinov2_main").mkdir()
    (tmp_path / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    return open_extractor("dinov2-vit-s-14", None, "cpu")


@pytest.fixture(scope="module")
def library(weights):
    return torch_fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )


def random_images(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)


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


class StopForwardError(Exception):
    """Ends a forward early."""


def network_input(extractor, images: torch.Tensor) -> torch.Tensor:
    """Input of the first convolution, (B, 3, 299, 299)."""
    inputs_of_convolutions = []

    def keep(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            inputs_of_convolutions.append(inputs[0])
            raise StopForwardError

    with torch.nn.modules.module.register_module_forward_pre_hook(keep), pytest.raises(StopForwardError):
        extractor(images)
    return inputs_of_convolutions[0]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference, divided by the norm of `theirs`."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(("height", "width"), [(48, 80), (400, 320)])
def test_inception_matches_the_librarys_features_and_tensorflows_resize(inception, library, height, width):
    images = random_images(height, width)
    ours = inception(images)
    pooled, logits = library(images.permute(0, 3, 1, 2).contiguous())
    assert max(relative(ours.pooled, pooled), relative(ours.logits, logits)) <= 1e-6
    pixels = network_input(inception, images).permute(0, 2, 3, 1).double().numpy()
    expected = (tensorflow_bilinear(images.double().numpy(), 299) - 128) / 128
    assert np.abs(pixels - expected).max() < 1e-4
    half_pixel = F.interpolate(images.permute(0, 3, 1, 2).double(), size=(299, 299), mode="bilinear")
    half_pixel = (half_pixel.permute(0, 2, 3, 1).numpy() - 128) / 128
    assert np.abs(half_pixel - expected).max() > 0.1  # these images distinguish the two rules


def test_float_pixels_have_the_features_of_uint8_images_and_a_gradient(inception, dinov2):
    images = random_images(48, 48)
    for extractor in (inception, dinov2):
        pixels = images.permute(0, 3, 1, 2).float().requires_grad_()
        pooled = extractor.pooled(pixels)
        assert relative(pooled, extractor(images).pooled) <= 1e-6
        pooled.square().sum().backward()
        assert float(pixels.grad.abs().sum()) > 0.0


def test_spatial_features_are_flattened_height_by_width_by_channel(inception, library):
    images = random_images(64, 64)
    outputs = []
    with library.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        library(images.permute(0, 3, 1, 2))
    expected = outputs[0][:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
    assert float(expected.std()) > 0.1
    ours = inception(images)
    assert [tuple(part.shape) for part in (ours.pooled, ours.logits, ours.spatial)] == [(2, 2048), (2, 1008), (2, 2023)]
    assert {part.dtype for part in (ours.pooled, ours.logits, ours.spatial)} == {torch.float32}
    assert not ours.pooled.requires_grad
    assert torch.equal(ours.spatial.view(2, 17, 17, 7), expected.permute(0, 2, 3, 1))


def test_only_the_published_weights_give_a_distance_called_fid(inception, weights, tmp_path, monkeypatch):
    assert inception.class_names is None
    assert inception.identity["name"] == "inception-other-weights"
    assert inception.identity["library"] == "torch-fidelity 0.4.0"
    assert distance_name(inception.identity) == "Fréchet distance (inception-other-weights)"
    published = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "PUBLISHED_WEIGHTS_SHA256", published)
    assert distance_name(open_extractor("inception", weights, "cpu").identity) == "FID"
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="do not fit torch-fidelity's Inception-2015"):
        open_extractor("inception", tmp_path / "other.pth", "cpu")


def test_dinov2_matches_the_librarys_features_and_has_no_logits(dinov2):
    library = torch_fidelity.FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = random_images(48, 80)
    ours = dinov2(images)
    (theirs,) = library(images.permute(0, 3, 1, 2))
    assert ours.pooled.shape == (2, 384)
    assert relative(ours.pooled, theirs) <= 1e-6
    assert (ours.logits, ours.spatial) == (None, None)
    assert distance_name(dinov2.identity) == "Fréchet distance (dinov2-vit-s-14)"


def test_failed_downloads_name_a_remedy(tmp_path):
    torch.hub.set_dir(tmp_path / "empty")
    with pytest.raises(InputError, match="give its path as --extractor-weights"):
        open_extractor("inception", None, "cpu")
    with pytest.raises(InputError, match="save it as TorchScript on another machine"):
        open_extractor("dinov2-vit-s-14", None, "cpu")


# With fewer samples than dimensions, zero eigenvalues leave square roots of rounding errors.
@pytest.mark.parametrize(("count", "tolerance"), [(2000, 1e-9), (100, 1e-6)])
def test_frechet_distance_matches_the_librarys(count, tolerance):
    generator = torch.Generator().manual_seed(0)
    mixing, first, second = (
        torch.randn(rows, 128, generator=generator, dtype=torch.float64) for rows in (128, count, count)
    )
    first, second = first @ mixing, second @ mixing * 1.1 + 0.5
    ours = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    statistics = (fid_features_to_statistics(first), fid_features_to_statistics(second))
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert ours == pytest.approx(theirs, rel=tolerance)
