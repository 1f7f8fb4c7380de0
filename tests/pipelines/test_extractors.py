import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pipelines.command import InputError
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.extractors import describe, open_extractor
from tests.readme import REPOSITORY

# torch-fidelity imports a torchvision, and the published one does not import beside CPU torch. Of it, only normalize runs.
TORCHVISION = {
    "__init__.py": "from torchvision import datasets, models, transforms\n",
    "datasets.py": "class CIFAR10: pass\nclass CIFAR100(CIFAR10): pass\nclass STL10: pass\n",
    "models.py": "",
    "transforms/__init__.py": "from torchvision.transforms import functional\n",
    "transforms/functional.py": """
import torch

def normalize(tensor, mean, std, inplace=False):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (tensor - mean) / std
""",
}


def install(folder, *requirements):
    """Into a folder of its own: beside torch-fidelity in the environment, torchmetrics would not import."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    environment = {**os.environ, "PIP_CONSTRAINT": str(REPOSITORY / "constraints.txt")}
    subprocess.run([*command, "--target", str(folder), *requirements], env=environment, check=True, timeout=200)


def run_check(script, folder, argument, tmp_path):
    environment = {
        **os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}", "TORCH_HOME": str(tmp_path / "torch"), "OMP_NUM_THREADS": "2",
        # No request leaves the machine, whatever network it has.
        "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "",
    }  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "tests" / script), str(argument)]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr[-4000:]
    return json.loads(checked.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fidelity(tmp_path_factory):
    """What the check beside the real torch-fidelity found."""
    folder, work = tmp_path_factory.mktemp("fidelity"), tmp_path_factory.mktemp("work")
    install(folder, "torch-fidelity==0.4.0")
    for name, content in TORCHVISION.items():
        path = folder / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return run_check("torch_fidelity_check.py", folder, work, work)


def test_inception_is_torch_fidelity_s(fidelity):
    found = fidelity["inception"]
    print(json.dumps({key: found[key] for key in ("differences", "resize_errors", "half_pixel_errors")}))
    assert max(found["differences"].values()) <= 1e-6
    assert found["shapes"] == [[2, 2048], [2, 1008], [2, 2023]]
    assert found["dtypes"] == ["torch.float32"] * 3
    assert not found["needs_gradient"]
    assert found["class_names"] is None
    assert "does not hold the weights of Inception-2015" in found["other_weights"]


def test_inception_s_resize_is_tensorflow_s_and_no_other(fidelity):
    found = fidelity["inception"]
    assert max(found["resize_errors"].values()) <= 1e-4  # its coordinates are float32
    assert min(found["half_pixel_errors"].values()) > 0.05  # what F.interpolate does unless told otherwise
    (zero,), (middle,), (top,) = (found["levels"][level] for level in ("0", "128", "255"))
    assert (zero, middle, top) == (-1.0, 0.0, 127 / 128)


def test_inception_sees_colours_and_directions(fidelity):
    assert min(fidelity["inception"]["swapped_channels"], fidelity["inception"]["transposed"]) > 0.01


def test_spatial_features_lie_row_by_row_with_the_channel_last(fidelity):
    assert fidelity["inception"]["spatial_matches"]
    assert fidelity["inception"]["spatial_spread"] > 0.01


def test_only_the_published_weights_are_called_fid(fidelity):
    assert "FID" not in fidelity["inception"]["describe"]
    assert describe({"name": "inception"}) == "FID"
    assert "--extractor-weights" in fidelity["download"]


def test_dinov2_is_torch_fidelity_s(fidelity):
    found = fidelity["dinov2"]
    assert found["difference"] <= 1e-6
    assert (found["shape"], found["others"]) == ([2, 384], [None, None])
    assert "save it as TorchScript" in found["unreachable"]


def test_distance_is_torch_fidelity_s(fidelity):
    print(fidelity["frechet"])
    assert fidelity["frechet"]["2000"] <= 1e-9
    assert fidelity["frechet"]["100"] <= 1e-5  # fewer samples than features: square roots of zeros' rounding
    assert fidelity["probabilities"] <= 1e-6


def test_distance_is_torchmetrics(tmp_path):
    install(tmp_path / "site", "torchmetrics==1.9.0", "lightning-utilities==0.15.2")
    found = run_check("torchmetrics_check.py", tmp_path / "site", SHIPPED_JUDGE, tmp_path)
    print(found)
    assert found["difference"] <= 1e-4  # its square root goes by eigenvalues in float32's neighbourhood


def test_judge_s_features_and_classes():
    extractor = open_extractor(str(SHIPPED_JUDGE), None, "cpu")
    pixels, labels = (torch.from_numpy(array) for array in images.draw_many("val", 0, 20))
    seen = extractor(pixels)
    assert (seen.pooled.shape, seen.spatial) == ((20, 64), None)
    assert torch.equal(seen.logits.argmax(dim=1), labels)
    assert extractor.class_names == images.CLASS_NAMES
    assert describe(extractor.identity) == "Fréchet distance (judge)"
    with pytest.raises(InputError, match="sees images of 64x64, but got 32x32"):
        extractor(pixels[:, :32, :32])


class Plain(nn.Module):
    def forward(self, pixels):
        return pixels.float().mean(dim=(2, 3))


class WithFeatures(nn.Module):
    def forward(self, pixels, return_features: bool = False, no_output_bias: bool = False):
        features = pixels.float().mean(dim=(2, 3))
        if return_features:
            return features
        bias = torch.tensor([0.0 if no_output_bias else 5.0, 0.0, 0.0])
        return torch.softmax(features / 100.0 + bias, dim=1)


class Wrong(nn.Module):
    def forward(self, pixels):
        return pixels.float().mean()


def scripted(module, path):
    torch.jit.script(module).save(str(path))
    return str(path)


PIXELS = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEANS = PIXELS.float().mean(dim=(1, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_gives_features_and_unbiased_logits_where_it_has_them(tmp_path):
    plain = open_extractor(scripted(Plain(), tmp_path / "plain.pt"), None, "cpu")(PIXELS)
    torch.testing.assert_close(plain.pooled, MEANS)
    assert (plain.logits, plain.spatial) == (None, None)
    extractor = open_extractor(scripted(WithFeatures(), tmp_path / "both.ts"), None, "cpu")
    both = extractor(PIXELS)
    torch.testing.assert_close(both.pooled, MEANS)
    torch.testing.assert_close(both.logits.softmax(dim=1), (MEANS / 100.0).softmax(dim=1))
    assert describe(extractor.identity) == "Fréchet distance (both.ts)"
    assert len(extractor.identity["weights_sha256"]) == 64


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_other_extractors_are_refused(tmp_path):
    with pytest.raises(InputError, match="floating-point features"):
        open_extractor(scripted(Wrong(), tmp_path / "wrong.pt"), None, "cpu")(PIXELS)
    (tmp_path / "text.pt").write_text("no script")
    with pytest.raises(InputError, match="is not TorchScript, or is damaged"):
        open_extractor(str(tmp_path / "text.pt"), None, "cpu")
    with pytest.raises(InputError, match="no extractor 'inceptoin'; known are inception, dinov2-vit-s-14"):
        open_extractor("inceptoin", None, "cpu")
    with pytest.raises(InputError, match="holds its weights itself"):
        open_extractor(str(SHIPPED_JUDGE), tmp_path / "x.pth", "cpu")
    with pytest.raises(InputError, match="takes no file of weights"):
        open_extractor("dinov2-vit-l-14", tmp_path / "x.pth", "cpu")


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_weights_that_would_run_code_are_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"fc.bias": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        open_extractor("inception", tmp_path / "trap.pth", "cpu")
    assert not (tmp_path / "sprung").exists()


def test_missing_library_is_named(tmp_path):
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"needs torch-fidelity, .*pip install 'meanflow-ray\[fid\]'"):
        open_extractor("inception", tmp_path / "weights.pth", "cpu")
