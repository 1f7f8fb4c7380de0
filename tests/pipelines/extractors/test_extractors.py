"""Feature extractors: Inception and DINOv2 against torch-fidelity, TorchScript files, and the demo's judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.extractors.opening import absolute_extractor, distance_name, open_extractor
from pipelines.judge.network import load_judge
from tests.support.readme import REPOSITORY

# The parts of torchvision that torch-fidelity uses. The published wheel cannot be imported with a CPU build of torch.
TORCHVISION = {
    "__init__.py": "from torchvision import datasets, transforms\n",
    "datasets.py": "class CIFAR10: ...\nclass CIFAR100: ...\nclass STL10: ...\n",
    "transforms/__init__.py": "from torchvision.transforms import functional\n",
    "transforms/functional.py": """
def normalize(tensor, mean, std, inplace=False):
    mean, std = (tensor.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (tensor - mean) / std
""",
}


def test_extractors_and_distances_agree_with_torch_fidelity(tmp_path):
    for name, text in TORCHVISION.items():
        path = tmp_path / "stub/torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    library = tmp_path / "library"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", library, "torch-fidelity"]
    constraints = {"PIP_CONSTRAINT": str(REPOSITORY / "constraints.txt")}
    subprocess.run(install, check=True, env={**os.environ, **constraints}, timeout=300)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (REPOSITORY, tmp_path / "stub", library)),
        **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),  # unreachable: no downloads
    }
    check = Path(__file__).with_name("torch_fidelity_check.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", check]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]


class MakesFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_with_code_are_refused_without_running_it(tmp_path):
    made = tmp_path / "made"
    torch.save({"fc.weight": torch.zeros(2), "more": MakesFolder(made)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="must contain only tensors"):
        open_extractor("inception", tmp_path / "weights.pth", "cpu")
    assert not made.exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert made.exists()  # loading without restrictions does run the code


def test_a_missing_library_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in ("inception", "dinov2-vit-b-14"):
        with pytest.raises(InputError, match=r"pip install .* '\.\[fid\]'.*efficientnet-lite0"):
            open_extractor(name, None, "cpu")


class Means(torch.nn.Module):
    """Features (B, 3): the mean of each channel."""

    def forward(self, x):
        return x.float().mean(dim=[2, 3])


class MeansOrProbabilities(torch.nn.Module):
    """Has the same argument as NVIDIA's Inception."""

    def forward(self, x: torch.Tensor, return_features: bool = False):
        means = x.float().mean(dim=[2, 3])
        return means if return_features else means.softmax(dim=1)


class FeatureMaps(torch.nn.Module):
    def forward(self, x):
        return x.float()


class Pair(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=[2, 3]), x


class Fails(torch.nn.Module):
    def forward(self, x):
        return torch.matmul(x.float().mean(dim=[2, 3]), torch.zeros(5, 5))


def scripted(module: torch.nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("module", [Means(), MeansOrProbabilities()])
def test_a_script_gives_pooled_features_only(tmp_path, pixels, module):
    extractor = open_extractor(scripted(module, tmp_path / "means.ts"), None, "cpu")
    features = extractor(pixels)
    torch.testing.assert_close(features.pooled, pixels.float().mean(dim=(1, 2)))
    assert (features.logits, features.spatial, extractor.class_names) == (None, None, None)
    assert distance_name(extractor.identity) == "Fréchet distance (means.ts)"


def test_scripts_saved_in_training_mode_and_frozen_scripts_open_in_evaluation_mode(tmp_path, pixels):
    in_training = scripted(torch.nn.Sequential(Means(), torch.nn.Dropout(0.5)).train(), tmp_path / "training.pt")
    torch.jit.freeze(torch.jit.script(Means().eval())).save(str(tmp_path / "frozen.pt"))
    for name in (in_training, str(tmp_path / "frozen.pt")):
        torch.testing.assert_close(open_extractor(name, None, "cpu")(pixels).pooled, pixels.float().mean(dim=(1, 2)))


def test_the_identity_of_a_script_contains_its_hash(tmp_path):
    first = open_extractor(scripted(Means(), tmp_path / "a.pt"), None, "cpu").identity
    again = open_extractor(scripted(FeatureMaps(), tmp_path / "a.pt"), None, "cpu").identity
    assert first["weights_sha256"] != again["weights_sha256"]
    assert {**first, "weights_sha256": ""} == {**again, "weights_sha256": ""}
    json.dumps(first)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (FeatureMaps(), r"must return a tensor \(5, D\) of features, but returned \(5, 3, 8, 12\)"),
        (Pair(), "but returned tuple"),
        (Fails(), r"failed on uint8 images \(5, 3, 8, 12\): .*shapes cannot be multiplied"),
    ],
)
def test_scripts_with_invalid_output_are_refused(tmp_path, pixels, module, message):
    extractor = open_extractor(scripted(module, tmp_path / "other.pt"), None, "cpu")
    with pytest.raises(InputError, match=message):
        extractor(pixels)


def test_files_that_are_not_scripts_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no archive")
    for name in ("weights.pt", "text.pt"):
        with pytest.raises(InputError, match="cannot load .* as TorchScript"):
            open_extractor(str(tmp_path / name), None, "cpu")
    with pytest.raises(InputError, match="no TorchScript file .*missing.pt"):
        open_extractor(str(tmp_path / "missing.pt"), None, "cpu")


def test_a_judge_gives_features_and_logits_of_its_classes():
    extractor = open_extractor(str(SHIPPED_JUDGE), None, "cpu")
    drawn, labels = (torch.from_numpy(array) for array in images.draw_many("val", 0, 50))
    features = extractor(drawn)
    expected = load_judge(SHIPPED_JUDGE).predict(drawn)
    assert torch.equal(features.pooled, expected.features)
    assert features.logits.shape == (50, 10)
    assert (features.logits.argmax(dim=1) == labels).double().mean() > 0.95
    assert features.spatial is None
    assert not features.pooled.requires_grad
    assert extractor.class_names == images.CLASS_NAMES
    assert extractor.identity["name"] == "judge"
    assert distance_name(extractor.identity) == "Fréchet distance (judge)"
    with pytest.raises(InputError, match="trained on images of 64x64 pixels, but got 32x32"):
        extractor(drawn[:, ::2, ::2])


def test_float_pixels_have_the_features_of_uint8_images_and_a_gradient(tmp_path, pixels):
    drawn = torch.from_numpy(images.draw_many("val", 0, 4)[0])
    for name, of_images in (
        (str(SHIPPED_JUDGE), drawn),
        ("efficientnet-lite0", drawn),
        (str(scripted(Means(), tmp_path / "means.pt")), pixels),
    ):
        extractor = open_extractor(name, None, "cpu")
        of_floats = of_images.permute(0, 3, 1, 2).float().requires_grad_()
        pooled = extractor.pooled(of_floats)
        torch.testing.assert_close(pooled.detach(), extractor(of_images).pooled, rtol=1e-5, atol=1e-5)
        pooled.square().sum().backward()
        assert float(of_floats.grad.abs().sum()) > 0.0


def test_an_unknown_extractor_lists_the_known_ones(tmp_path):
    with pytest.raises(
        InputError, match="unknown extractor 'clip'; known: inception, efficientnet-lite0, dinov2-vit-s-14, .* a judge"
    ):
        open_extractor("clip", None, "cpu")
    with pytest.raises(InputError, match="no judge in"):
        open_extractor(str(tmp_path), None, "cpu")


def test_unused_weights_are_refused(tmp_path):
    weights = tmp_path / "weights.pth"
    for name in ("means.pt", str(SHIPPED_JUDGE), "dinov2-vit-l-14"):
        with pytest.raises(InputError, match="--extractor-weights is only for inception, but the extractor is"):
            open_extractor(name, weights, "cpu")
    with pytest.raises(InputError, match="no weights file .*weights.pth"):
        open_extractor("inception", weights, "cpu")


def test_images_of_another_shape_or_dtype_are_refused(tmp_path, pixels):
    extractor = open_extractor(scripted(Means(), tmp_path / "means.pt"), None, "cpu")
    for wrong in (pixels.permute(0, 3, 1, 2), pixels.float(), pixels[0]):
        with pytest.raises(ValueError, match="images must be uint8 of shape"):
            extractor(wrong)


def test_known_names_are_not_taken_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("inception", "judge"):
        (tmp_path / name).mkdir()
    assert absolute_extractor("inception") == "inception"
    assert absolute_extractor("judge") == str(tmp_path / "judge")
