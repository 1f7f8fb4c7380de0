"""Feature extractors: Inception, DINOv2, EfficientNet-Lite0, a TorchScript file, or a judge.

B images of a batch, H W image size, D pooled features.

A distance depends on the extractor's weights, resize and input range. These form the extractor's identity, and only
statistics with equal identities can be compared.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from meanflow_core.autoencoder import weight_hash
from pipelines.errors import InputError
from pipelines.extractors.efficientnet import DISTANCE_EFFICIENTNET, EFFICIENTNET, EfficientNetLite0
from pipelines.extractors.interface import Extractor, Features, channels_first, file_hash
from pipelines.judge.network import load_judge

INCEPTION = "inception"
# Inception with unpublished weights: its distance must not be called FID.
INCEPTION_OTHER_WEIGHTS = "inception-other-weights"
DINOV2 = ("dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14", "dinov2-vit-g-14")
KNOWN = (INCEPTION, EFFICIENTNET, *DINOV2)
SCRIPT_SUFFIXES = (".pt", ".ts")

# SHA-256 of weights-inception-2015-12-05-6726825d.pth, torch-fidelity's conversion of TensorFlow's graph of 2015-12-05.
PUBLISHED_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# sFID uses the first 7 channels, height x width x channel: 17 * 17 * 7 = 2023 values. Source: guided-diffusion's
# evaluator, mixed_6/conv:0 and [..., :7]; that node is Mixed_6d.branch1x1 in torch-fidelity's conversion.
SPATIAL_CHANNELS = 7
INCEPTION_SIZE, DINOV2_SIZE = 299, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_extractor(name: str, weights: Path | None, device: str | torch.device) -> Extractor:
    """Opens an extractor: "inception", "efficientnet-lite0", a DINOv2 model, a TorchScript file, or the folder of a judge.

    weights: file of Inception's weights, weights-inception-2015-12-05-6726825d.pth; None downloads it. DINOv2 is
    loaded through torch.hub, which runs the code of facebookresearch/dinov2. Raises InputError for an unknown name, unused
    weights, an invalid file, a missing library and a failed download.
    """
    device = torch.device(device)
    path = Path(name)
    if name == INCEPTION:
        return _Inception(weights, device)
    if weights is not None:
        raise InputError(
            f"--extractor-weights is only for inception, but the extractor is {name}; to use other weights from disk, "
            f"save the network as TorchScript and give that file (*{SCRIPT_SUFFIXES[0]}) as --extractor"
        )
    if name == EFFICIENTNET:
        return EfficientNetLite0(device)
    if name in DINOV2:
        return _DinoV2(name, device)
    if path.is_dir():
        return _JudgeFeatures(path, device)
    if path.suffix in SCRIPT_SUFFIXES:
        return _Script(path, device)
    raise InputError(
        f"unknown extractor {name!r}; known: {', '.join(KNOWN)}, a TorchScript file "
        f"(*{', *'.join(SCRIPT_SUFFIXES)}) and the folder of a judge"
    )


def absolute_extractor(name: str) -> str:
    """Makes the path of an extractor's file or folder absolute for other processes. Other names stay as they are."""
    is_known = name in KNOWN  # even if a folder of that name exists here
    return str(Path(name).absolute()) if not is_known and Path(name).exists() else name


def distance_name(identity: Mapping[str, str]) -> str:
    """Title of the distance in an extractor's features: "FID" only for Inception with the published weights."""
    published = {INCEPTION: "FID", EFFICIENTNET: DISTANCE_EFFICIENTNET}
    return published.get(identity["name"], f"Fréchet distance ({identity['name']})")


class _Inception(Extractor):
    """torch-fidelity's Inception-2015, with its resize and input range."""

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        path = _published_weights() if weights is None else weights
        # torch-fidelity unpickles without restrictions. Load only tensors here, and pass them on as a new file.
        state = _load_tensors(path)
        library = _torch_fidelity()
        tensors_only = io.BytesIO()
        torch.save(state, tensors_only)
        tensors_only.seek(0)
        try:
            self._network = library.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors_only
            ).to(device)
            self._network.requires_grad_(False)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"the tensors in {path} do not fit torch-fidelity's Inception-2015; give "
                "weights-inception-2015-12-05-6726825d.pth"
            ) from error
        self._library, self._device = library, device
        is_published = file_hash(path) == PUBLISHED_WEIGHTS_SHA256
        self.identity = {
            "name": INCEPTION if is_published else INCEPTION_OTHER_WEIGHTS,
            "weights_sha256": weight_hash(self._network),
            "resize": "TensorFlow 1 bilinear to 299x299, corners not aligned, no half pixel",
            "input": "uint8 RGB, (x - 128) / 128",
            "library": f"torch-fidelity {library.__version__}",
        }

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        # The network takes uint8 images only, so its first layer gets the resized float pixels in their place.
        resize = self._library.feature_extractor_inceptionv3.interpolate_bilinear_2d_like_tensorflow1x
        prepared = (resize(pixels, size=(INCEPTION_SIZE, INCEPTION_SIZE), align_corners=False) - 128) / 128
        with self._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: (prepared,)):
            pooled, _ = self._network(pixels.detach().to(torch.uint8))
        return pooled

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        outputs: list[torch.Tensor] = []
        branch = self._network.Mixed_6d.branch1x1
        with branch.register_forward_hook(lambda module, inputs, output: outputs.append(output[:, :SPATIAL_CHANNELS])):
            pooled, logits = self._network(channels_first(images, self._device))
        spatial = outputs[0].permute(0, 2, 3, 1).flatten(1)  # (B, 7, 17, 17) -> (B, 2023)
        return Features(pooled.float(), logits.float(), spatial.float())


class _DinoV2(Extractor):
    """The class token of torch-fidelity's DINOv2, which has no classifier."""

    def __init__(self, name: str, device: torch.device) -> None:
        library = _torch_fidelity()
        try:
            self._network = library.FeatureExtractorDinoV2(name, ["dinov2"]).to(device).requires_grad_(False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"torch.hub could not load {name} from github.com/facebookresearch/dinov2: {error}; without internet access, "
                f"save it as TorchScript on another machine and give that file (*{SCRIPT_SUFFIXES[0]}) as --extractor"
            ) from error
        self._library, self._device = library, device
        self.identity = {
            "name": name,
            "weights_sha256": weight_hash(self._network),
            "resize": "TensorFlow 1 bilinear to 224x224, corners not aligned, no half pixel",
            "input": "uint8 RGB, ImageNet's mean and standard deviation",
            "library": f"torch-fidelity {library.__version__}",
        }

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        # The library's own forward takes uint8 images only.
        resize = self._library.feature_extractor_dinov2.interpolate_bilinear_2d_like_tensorflow1x
        resized = resize(pixels, size=(DINOV2_SIZE, DINOV2_SIZE), align_corners=False)
        mean, deviation = (pixels.new_tensor(values).view(3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
        features: torch.Tensor = self._network.model((resized - mean) / deviation)
        return features.float()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        (pooled,) = self._network(channels_first(images, self._device))
        return Features(pooled.float(), None, None)


class _Script(Extractor):
    """A TorchScript file that maps uint8 (B, 3, H, W) to features (B, D). It gives no logits.

    A refinement gives it float pixels of the same values.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise InputError(f"no TorchScript file {path}")
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"cannot load {path} as TorchScript; give a file written by torch.jit.save") from error
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)
        # NVIDIA's Inception returns class probabilities by default.
        names = {argument.name for argument in self._network.forward.schema.arguments}
        self._arguments = {"return_features": True} if "return_features" in names else {}
        self._path = path
        self._device = device
        self.identity = {
            "name": path.name,
            "weights_sha256": file_hash(path),
            "resize": "by the script",
            "input": "uint8 RGB, scaled by the script",
            "library": "TorchScript",
        }

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        try:
            output = self._network(pixels, **self._arguments)
        except RuntimeError as error:  # includes torch.jit.Error
            last, kind = str(error).strip().splitlines()[-1], str(pixels.dtype).removeprefix("torch.")
            raise InputError(f"{self._path} failed on {kind} images {tuple(pixels.shape)}: {last}") from error
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != len(pixels):
            raise InputError(f"{self._path} must return a tensor ({len(pixels)}, D) of features, but returned {shape}")
        return output.float()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        return Features(self.pooled(channels_first(images, self._device)), None, None)


class _JudgeFeatures(Extractor):
    """A judge: features, and logits of the data set's own classes."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._judge = load_judge(folder).to(device).requires_grad_(False)
        self._device = device
        self.class_names = tuple(self._judge.config.class_names)
        size = self._judge.config.image_size
        self.identity = {
            "name": "judge",
            "weights_sha256": weight_hash(self._judge),
            "resize": f"none: images must be {size}x{size}",
            "input": "uint8 RGB, x / 127.5 - 1",
            "library": "pipelines.judge",
        }

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        self._judge.require_size(*pixels.shape[2:])
        features, _, _ = self._judge(pixels / 127.5 - 1.0)
        return features

    def __call__(self, images: torch.Tensor) -> Features:
        prediction = self._judge.predict(images.to(self._device), batch_size=len(images))
        return Features(prediction.features, prediction.logits, None)


def _torch_fidelity() -> ModuleType:
    try:
        import torch_fidelity  # type: ignore  # optional, and without types
    except ImportError as error:
        raise InputError(
            f"this extractor needs torch-fidelity, which cannot be imported ({error}). In the folder of the checkout, run "
            f"pip install --constraint constraints-gpu.txt --editable '.[fid]'. It needs torchvision; with a CPU build of "
            f"torch, use --extractor efficientnet-lite0, or a judge"
        ) from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise InputError(
            f"torch-fidelity cannot be imported ({error}); install the torchvision built for torch {torch.__version__}"
        ) from error
    return torch_fidelity


def _published_weights() -> Path:
    """Path of Inception's published weights in torch.hub's folder, downloaded if missing."""
    url = _torch_fidelity().feature_extractor_inceptionv3.URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=PUBLISHED_WEIGHTS_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # no connection; wrong hash
        raise InputError(
            f"could not download Inception's weights from {url}: {error}; download that file on another machine and give its "
            "path as --extractor-weights"
        ) from error
    return path


def _load_tensors(path: Path) -> Any:
    """Loads a torch.save file that contains only tensors and plain containers. Raises InputError for any other file."""
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other file formats raise many types of exceptions
        raise InputError(
            f"{path} must contain only tensors, because other pickled objects can run code, but it contains others or is "
            "damaged; give weights-inception-2015-12-05-6726825d.pth"
        ) from error
