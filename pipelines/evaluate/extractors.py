"""What turns images into features to measure in: the standard Inception, DINOv2, any TorchScript file, or a judge.

B images of a batch, H W image size, D pooled features, K classes, S spatial features.

A distance depends on everything between the pixels and the features: the weights, the resize, the range. Each extractor
names them in its identity, and statistics compare only where these agree.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from meanflow_core.autoencoder import weight_hash
from pipelines.errors import InputError
from pipelines.evaluate.judge import load_judge

INCEPTION = "inception"
# Another Inception than everybody's: its distance must not be called FID.
INCEPTION_OTHER_WEIGHTS = "inception-other-weights"
DINOV2 = ("dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14", "dinov2-vit-g-14")
SCRIPT_SUFFIXES = (".pt", ".ts")

# Of weights-inception-2015-12-05-6726825d.pth: TensorFlow's graph of 2015-12-05, converted by torch-fidelity.
PUBLISHED_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# sFID takes the first 7 channels, height x width x channel: 17 * 17 * 7 = 2023 values. Source: guided-diffusion's
# evaluator, mixed_6/conv:0 and [..., :7]; torch-fidelity's conversion calls that node Mixed_6d.branch1x1.
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Features:
    """What an extractor sees in B images, on the extractor's device."""

    pooled: torch.Tensor
    """(B, D) float32: what the Frechet distance, precision and recall are taken in."""
    logits: torch.Tensor | None
    """(B, K) float32, before softmax, for the Inception Score; None without a classifier."""
    spatial: torch.Tensor | None
    """(B, S) float32, flattened height x width x channel, for sFID; None without."""


class Extractor(Protocol):
    """Images to features, without gradients."""

    identity: dict[str, str]
    """Name, weights and treatment of the pixels: two statistics compare only where these agree."""
    class_names: tuple[str, ...] | None
    """Of the logits, where they are the data set's own classes; else None."""

    def __call__(self, images: torch.Tensor) -> Features:
        """Features of one batch, uint8 (B, H, W, 3) on any device.

        Raises ValueError for images of another shape or dtype, InputError for images that the network cannot take.
        """


def open_extractor(name: str, weights: Path | None, device: str | torch.device) -> Extractor:
    """The extractor of a name: "inception", a DINOv2, a TorchScript file, or a judge's folder.

    `weights` is Inception's file, weights-inception-2015-12-05-6726825d.pth; without it, it is downloaded. DINOv2 comes
    through torch.hub, which runs the code of facebookresearch/dinov2. Raises InputError for an unknown name, for weights
    where they are not used, for files that are not what they should be, and for what is not installed or not reachable.
    """
    device = torch.device(device)
    path = Path(name)
    if name == INCEPTION:
        return _Inception(weights, device)
    if name in DINOV2:
        if weights is not None:
            raise InputError(
                f"{name} takes no file of weights, torch.hub brings its own; for weights on disk save the network as "
                f"TorchScript and name that file (*{SCRIPT_SUFFIXES[0]}) as the extractor"
            )
        return _DinoV2(name, device)
    if path.suffix not in SCRIPT_SUFFIXES and not path.is_dir():
        raise InputError(
            f"no extractor {name!r}; known are {', '.join((INCEPTION, *DINOV2))}, a TorchScript file "
            f"(*{', *'.join(SCRIPT_SUFFIXES)}) and the folder of a judge"
        )
    if weights is not None:
        raise InputError(f"the extractor {name} holds its weights itself, but got --extractor-weights {weights}")
    return _JudgeFeatures(path, device) if path.is_dir() else _Script(path, device)


def describe(identity: Mapping[str, str]) -> str:
    """What a table calls the distance in these features: FID for torch-fidelity's Inception with published weights only."""
    return "FID" if identity["name"] == INCEPTION else f"Fréchet distance ({identity['name']})"


class _Inception:
    """Inception-2015 as torch-fidelity has it: its own resize, its own range."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        path = _published_weights() if weights is None else weights
        # Opened here, because the library unpickles a file in full, code and all; what it gets is written afresh.
        state = _tensors(path)
        library = _torch_fidelity()
        rewritten = io.BytesIO()
        torch.save(state, rewritten)
        rewritten.seek(0)
        try:
            self._network = library.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=rewritten
            ).to(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"{path} does not hold the weights of Inception-2015 as torch-fidelity names them; wanted is "
                "weights-inception-2015-12-05-6726825d.pth"
            ) from error
        self._device = device
        published = _file_hash(path) == PUBLISHED_WEIGHTS_SHA256
        self.identity = {
            "name": INCEPTION if published else INCEPTION_OTHER_WEIGHTS,
            "weights_sha256": weight_hash(self._network),
            "resize": "TensorFlow 1 bilinear to 299x299, corners not aligned, no half pixel",
            "input": "uint8 RGB, (x - 128) / 128",
            "library": f"torch-fidelity {library.__version__}",
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        kept: list[torch.Tensor] = []
        branch = self._network.Mixed_6d.branch1x1
        with branch.register_forward_hook(lambda module, inputs, output: kept.append(output[:, :SPATIAL_CHANNELS])):
            pooled, logits = self._network(_channels_first(images, self._device))
        spatial = kept[0].permute(0, 2, 3, 1).flatten(1)  # (B, 7, 17, 17) -> (B, 2023)
        return Features(pooled.float(), logits.float(), spatial.float())


class _DinoV2:
    """A DINOv2 as torch-fidelity has it: its class token, and no classifier."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, name: str, device: torch.device) -> None:
        library = _torch_fidelity()
        try:
            self._network = library.FeatureExtractorDinoV2(name, ["dinov2"]).to(device)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"torch.hub could not load {name} from github.com/facebookresearch/dinov2: {error}; where there is no "
                f"network, save it as TorchScript elsewhere and name that file (*{SCRIPT_SUFFIXES[0]}) as the extractor"
            ) from error
        self._device = device
        self.identity = {
            "name": name,
            "weights_sha256": weight_hash(self._network),
            "resize": "TensorFlow 1 bilinear to 224x224, corners not aligned, no half pixel",
            "input": "uint8 RGB, ImageNet's mean and standard deviation",
            "library": f"torch-fidelity {library.__version__}",
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        (pooled,) = self._network(_channels_first(images, self._device))
        return Features(pooled.float(), None, None)


class _Script:
    """A TorchScript file: uint8 (B, 3, H, W) to features (B, D); with NVIDIA's arguments, to class probabilities too."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise InputError(f"no file {path} to take the extractor from")
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} is not TorchScript, or is damaged; wanted is a file of torch.jit.save that takes uint8 images "
                "(B, 3, H, W)"
            ) from error
        self._arguments = {argument.name for argument in self._network.forward.schema.arguments}
        self._path = path
        self._device = device
        self.identity = {
            "name": path.name,
            "weights_sha256": _file_hash(path),
            "resize": "the script's own",
            "input": "uint8 RGB, the script's own range",
            "library": "TorchScript",
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pixels = _channels_first(images, self._device)
        if "return_features" not in self._arguments:
            return Features(self._run(pixels, {}), None, None)
        pooled = self._run(pixels, {"return_features": True})
        # Without the bias, as the Inception Score was first computed.
        no_bias = {"no_output_bias": True} if "no_output_bias" in self._arguments else {}
        probabilities = self._run(pixels, no_bias)
        if bool(((probabilities.sum(dim=1) - 1).abs() > 1e-3).any()):
            raise InputError(
                f"{self._path} must give class probabilities without return_features, but gave other values"
            )
        # A probability may underflow to 0, whose logarithm would make the score not a number.
        logits = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
        return Features(pooled, logits, None)

    def _run(self, pixels: torch.Tensor, arguments: dict[str, bool]) -> torch.Tensor:
        try:
            output = self._network(pixels, **arguments)
        except RuntimeError as error:  # torch.jit.Error is one
            last = str(error).strip().splitlines()[-1]
            raise InputError(f"{self._path} failed on uint8 images {tuple(pixels.shape)}: {last}") from error
        if not isinstance(output, torch.Tensor):
            raise InputError(f"{self._path} must give one tensor (B, D), but gave {type(output).__name__}")
        if output.dim() != 2 or len(output) != len(pixels) or not output.is_floating_point():
            raise InputError(
                f"{self._path} must give floating-point features ({len(pixels)}, D) for {len(pixels)} images, but gave "
                f"{output.dtype} {tuple(output.shape)}"
            )
        return output.float()


class _JudgeFeatures:
    """The classifier of a small data set: its features, and answers in the data set's own classes."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._judge = load_judge(folder).to(device)
        self._device = device
        self.class_names: tuple[str, ...] | None = tuple(self._judge.config.class_names)
        size = self._judge.config.image_size
        self.identity = {
            "name": "judge",
            "weights_sha256": weight_hash(self._judge),
            "resize": f"none: images must be {size}x{size}",
            "input": "uint8 RGB, x / 127.5 - 1",
            "library": "pipelines.evaluate.judge",
        }

    def __call__(self, images: torch.Tensor) -> Features:
        seen = self._judge.look_at(images.to(self._device), batch_size=len(images))
        return Features(seen.features, seen.logits, None)


def _channels_first(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, 3, H, W) on the device."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 of shape (B, H, W, 3), but got {images.dtype} {tuple(images.shape)}")
    return images.to(device).permute(0, 3, 1, 2).contiguous()


def _torch_fidelity() -> ModuleType:
    try:
        import torch_fidelity  # type: ignore  # of an extra: it may be missing, and has no types where it is not
    except ImportError as error:
        raise InputError(
            f"this extractor needs torch-fidelity, which does not import ({error}); pip install 'meanflow-ray[fid]'"
        ) from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise InputError(
            f"torch-fidelity does not import ({error}); its torchvision must be built for this torch, {torch.__version__}"
        ) from error
    return torch_fidelity


def _published_weights() -> Path:
    """Where torch.hub keeps Inception's published weights, downloaded unless they lie there."""
    url = _torch_fidelity().feature_extractor_inceptionv3.URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=PUBLISHED_WEIGHTS_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # no network; other bytes than were published
        raise InputError(
            f"could not download Inception's weights from {url}: {error}; fetch that file elsewhere and give its path as "
            "--extractor-weights"
        ) from error
    return path


def _tensors(path: Path) -> Any:
    """What torch.save wrote, tensors and plain containers alone. Raises InputError for anything more."""
    if not path.is_file():
        raise InputError(f"no file {path} to take the extractor's weights from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another format fails in any way
        raise InputError(
            f"{path} holds more than tensors, or is damaged, and is not loaded: a pickle may run any code; wanted is "
            "weights-inception-2015-12-05-6726825d.pth"
        ) from error


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
