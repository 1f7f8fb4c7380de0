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
from pipelines.evaluate.extractors import distance_name, open_extractor
from pipelines.evaluate.judge import load_judge

REPOSITORY = Path(__file__).parents[3]

# What torch-fidelity asks of torchvision: names at import, and normalize. The published wheel does not import beside a
# CPU build of torch.
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


def install(folder: Path, *packages: str) -> Path:
    """Packages alone in a folder of their own, in the versions of constraints.txt: beside the environment, not in it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    constraints = {"PIP_CONSTRAINT": str(REPOSITORY / "constraints.txt")}
    subprocess.run(command, check=True, env={**os.environ, **constraints}, timeout=300)
    return folder


def figures_of(script: str, argument: Path, *folders: Path, **environment: str) -> dict:
    """What a script prints, run with these folders before the environment's packages and without a network."""
    unreachable = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (REPOSITORY, *folders)),
        "PYTHONSAFEPATH": "1",  # the folder of the script has packages of the repository's names
        "http_proxy": unreachable,
        "https_proxy": unreachable,
        **environment,
    }
    command = [sys.executable, str(REPOSITORY / "tests" / script), str(argument)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fidelity(tmp_path_factory) -> dict:
    """The figures of tests/pipelines/evaluate/torch_fidelity_check.py."""
    root = tmp_path_factory.mktemp("torch_fidelity")
    for name, text in TORCHVISION.items():
        path = root / "stub/torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    library = install(root / "library", "torch-fidelity")
    (root / "work").mkdir()
    return figures_of(
        "torch_fidelity_check.py", root / "work", root / "stub", library, TORCH_HOME=str(root / "torch_home")
    )


def test_inception_features_and_logits_are_the_librarys_own(fidelity):
    inception = fidelity["inception"]
    assert inception["shapes"] == [[2, 2048], [2, 1008], [2, 2023]]
    assert inception["dtypes"] == ["torch.float32"] * 3
    assert not inception["needs_gradient"]
    assert inception["class_names"] is None
    assert max(inception["differences"].values()) <= 1e-6


def test_inception_sees_what_tensorflow_1_would_resize_to(fidelity):
    inception = fidelity["inception"]
    assert max(inception["resize_errors"].values()) < 1e-4
    assert min(inception["half_pixel_errors"].values()) > 0.1  # the images would tell another rule


def test_inception_maps_levels_to_minus_one_to_below_one(fidelity):
    assert fidelity["inception"]["levels"] == {"0": [-1.0], "128": [0.0], "255": [127 / 128]}


def test_inception_tells_channels_and_axes_apart(fidelity):
    # Beside equality with the library: with these weights, swapping them would have been seen.
    assert fidelity["inception"]["swapped_channels"] > 1e-3
    assert fidelity["inception"]["transposed"] > 1e-3


def test_spatial_features_run_over_rows_then_columns_then_channels(fidelity):
    assert fidelity["inception"]["spatial_spread"] > 0.1
    assert fidelity["inception"]["spatial_matches"]


def test_inception_of_other_weights_is_not_called_fid(fidelity):
    inception = fidelity["inception"]
    assert inception["identity"]["name"] == "inception-other-weights"
    assert inception["identity"]["library"] == "torch-fidelity 0.4.0"
    assert inception["describe"] == "Fréchet distance (inception-other-weights)"
    assert inception["name_of_published"] == "inception"
    assert "does not hold the weights of Inception-2015" in inception["other_weights"]


def test_dinov2_gives_the_librarys_features_and_nothing_else(fidelity):
    dinov2 = fidelity["dinov2"]
    assert dinov2["shape"] == [2, 384]
    assert dinov2["difference"] <= 1e-6
    assert dinov2["others"] == [None, None]
    assert dinov2["identity"]["name"] == "dinov2-vit-s-14"
    assert dinov2["describe"] == "Fréchet distance (dinov2-vit-s-14)"


def test_what_cannot_be_downloaded_names_the_way_out(fidelity):
    assert "give its path as --extractor-weights" in fidelity["download"]
    assert "save it as TorchScript elsewhere" in fidelity["dinov2"]["unreachable"]


def test_frechet_distance_is_torch_fidelitys(fidelity):
    assert fidelity["frechet"]["2000"] < 1e-9
    assert fidelity["frechet"]["100"] < 1e-6  # fewer samples than dimensions: its square roots of rounding errors


def test_logarithms_of_probabilities_score_as_logits_do(fidelity):
    assert fidelity["probabilities"] < 1e-6


def test_frechet_distance_is_torchmetrics(tmp_path):
    library = install(tmp_path / "library", "torchmetrics", "lightning-utilities")
    assert figures_of("torchmetrics_check.py", SHIPPED_JUDGE, library)["difference"] < 1e-6


class MakesFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_that_would_run_code_are_refused_and_not_run(tmp_path):
    made = tmp_path / "made"
    torch.save({"fc.weight": torch.zeros(2), "more": MakesFolder(made)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        open_extractor("inception", tmp_path / "weights.pth", "cpu")
    assert not made.exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert made.exists()  # it would have


def test_missing_library_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in ("inception", "dinov2-vit-b-14"):
        with pytest.raises(InputError, match=r"pip install 'meanflow-ray\[fid\]'"):
            open_extractor(name, None, "cpu")


class Means(torch.nn.Module):
    """Features (B, 3): the mean of each channel."""

    def forward(self, x):
        return x.float().mean(dim=[2, 3])


class WithProbabilities(torch.nn.Module):
    """Takes what NVIDIA's Inception does: features of the channels' means, else probabilities of 4 classes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) / 16)
        self.bias = torch.nn.Parameter(torch.arange(4.0))

    def forward(
        self, x: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        features = x.float().mean(dim=[2, 3])
        if return_features:
            return features
        logits = torch.nn.functional.linear(features, self.weight, None if no_output_bias else self.bias)
        return logits.softmax(dim=1)


class LogitsInstead(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False):
        return x.float().mean(dim=[2, 3])


class Maps(torch.nn.Module):
    def forward(self, x):
        return x.float()


class Integers(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)


class Pair(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=[2, 3]), x


class Square(torch.nn.Module):
    def forward(self, x):
        return torch.matmul(x.float().mean(dim=[2, 3]), torch.zeros(5, 5))


def scripted(module: torch.nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_plain_script_gives_pooled_features_alone(tmp_path, pixels):
    extractor = open_extractor(scripted(Means(), tmp_path / "means.ts"), None, "cpu")
    seen = extractor(pixels)
    torch.testing.assert_close(seen.pooled, pixels.float().mean(dim=(1, 2)))
    assert (seen.logits, seen.spatial, extractor.class_names) == (None, None, None)
    assert distance_name(extractor.identity) == "Fréchet distance (means.ts)"


def test_script_saved_in_training_sees_the_same_twice(tmp_path, pixels):
    module = torch.nn.Sequential(Means(), torch.nn.Dropout(0.5))
    seen = open_extractor(scripted(module.train(), tmp_path / "training.pt"), None, "cpu")(pixels)
    torch.testing.assert_close(seen.pooled, pixels.float().mean(dim=(1, 2)))


def test_frozen_script_opens(tmp_path, pixels):
    torch.jit.freeze(torch.jit.script(Means().eval())).save(str(tmp_path / "frozen.pt"))
    seen = open_extractor(str(tmp_path / "frozen.pt"), None, "cpu")(pixels)
    torch.testing.assert_close(seen.pooled, pixels.float().mean(dim=(1, 2)))


def test_script_with_nvidias_arguments_gives_logits_without_the_bias(tmp_path, pixels):
    module = WithProbabilities()
    seen = open_extractor(scripted(module, tmp_path / "classes.pt"), None, "cpu")(pixels)
    means = pixels.float().mean(dim=(1, 2))
    torch.testing.assert_close(seen.pooled, means)
    torch.testing.assert_close(seen.logits.softmax(dim=1), (means @ module.weight.T).softmax(dim=1).detach())
    assert not seen.logits.requires_grad


def test_probability_of_zero_has_a_finite_logit(tmp_path, pixels):
    module = WithProbabilities()
    module.weight.data.mul_(1e4)
    seen = open_extractor(scripted(module, tmp_path / "sure.pt"), None, "cpu")(pixels)
    assert bool((seen.logits.softmax(dim=1) < 1e-37).any())
    assert bool(torch.isfinite(seen.logits).all())


def test_other_bytes_of_a_script_are_another_identity(tmp_path):
    first = open_extractor(scripted(Means(), tmp_path / "a.pt"), None, "cpu").identity
    again = open_extractor(scripted(WithProbabilities(), tmp_path / "a.pt"), None, "cpu").identity
    assert first["weights_sha256"] != again["weights_sha256"]
    assert {**first, "weights_sha256": ""} == {**again, "weights_sha256": ""}
    json.dumps(first)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Maps(), r"floating-point features \(5, D\) for 5 images, but gave torch.float32 \(5, 3, 8, 12\)"),
        (Integers(), r"but gave torch.uint8 \(5, 288\)"),
        (Pair(), r"must give one tensor \(B, D\), but gave tuple"),
        (LogitsInstead(), "must give class probabilities"),
        (Square(), r"failed on uint8 images \(5, 3, 8, 12\): .*shapes cannot be multiplied"),
    ],
)
def test_script_of_another_output_is_refused(tmp_path, pixels, module, message):
    extractor = open_extractor(scripted(module, tmp_path / "other.pt"), None, "cpu")
    with pytest.raises(InputError, match=message):
        extractor(pixels)


def test_file_that_is_no_script_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no archive")
    for name in ("weights.pt", "text.pt"):
        with pytest.raises(InputError, match="is not TorchScript"):
            open_extractor(str(tmp_path / name), None, "cpu")
    with pytest.raises(InputError, match="no file .*missing.pt"):
        open_extractor(str(tmp_path / "missing.pt"), None, "cpu")


def test_judge_gives_its_features_and_answers_in_its_own_classes():
    extractor = open_extractor(str(SHIPPED_JUDGE), None, "cpu")
    drawn, labels = (torch.from_numpy(array) for array in images.draw_many("val", 0, 100))
    seen = extractor(drawn)
    expected = load_judge(SHIPPED_JUDGE).predict(drawn)
    assert torch.equal(seen.pooled, expected.features)
    assert seen.logits.shape == (100, 10)
    assert (seen.logits.argmax(dim=1) == labels).double().mean() > 0.95
    assert seen.spatial is None
    assert not seen.pooled.requires_grad
    assert extractor.class_names == images.CLASS_NAMES
    assert extractor.identity["name"] == "judge"
    assert distance_name(extractor.identity) == "Fréchet distance (judge)"
    with pytest.raises(InputError, match="the judge sees images of 64x64, but got 32x32"):
        extractor(drawn[:, ::2, ::2])


def test_unknown_extractor_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="no extractor 'clip'; known are inception, dinov2-vit-s-14, .* a judge"):
        open_extractor("clip", None, "cpu")
    with pytest.raises(InputError, match="no judge in"):
        open_extractor(str(tmp_path), None, "cpu")


def test_weights_are_refused_where_they_are_not_used(tmp_path):
    weights = tmp_path / "weights.pth"
    script = scripted(Means(), tmp_path / "means.pt")
    for name, message in (
        (script, "holds its weights itself"),
        (str(SHIPPED_JUDGE), "holds its weights itself"),
        ("dinov2-vit-l-14", "as TorchScript"),
    ):
        with pytest.raises(InputError, match=message):
            open_extractor(name, weights, "cpu")
    with pytest.raises(InputError, match="no file .*weights.pth"):
        open_extractor("inception", weights, "cpu")


def test_images_of_another_layout_are_refused(tmp_path, pixels):
    extractor = open_extractor(scripted(Means(), tmp_path / "means.pt"), None, "cpu")
    for wrong in (pixels.permute(0, 3, 1, 2), pixels.float(), pixels[0]):
        with pytest.raises(ValueError, match="images must be uint8 of shape"):
            extractor(wrong)


def test_only_torch_fidelitys_inception_is_called_fid():
    assert distance_name({"name": "inception"}) == "FID"
    assert distance_name({"name": "inception-2015-12-05.pt"}) == "Fréchet distance (inception-2015-12-05.pt)"
