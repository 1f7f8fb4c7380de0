"""Options of the commands `meanflow evaluate`, `meanflow reference` and `meanflow side-by-side`."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.cluster import Device
from pipelines.evaluate.samples import Labels, Setting

STANDARD_NUM_SAMPLES = 50_000  # published FIDs use this number


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options for computing features of images."""

    extractor: str = "inception"
    """Feature extractor: inception or dinov2-vit-{s,b,l,g}-14 (which need the extra `fid`), efficientnet-lite0 (which needs
    the extra `efficientnet` and no torchvision), a TorchScript file, or the folder of a judge: a small classifier that
    `meanflow judge` trained, or the demo's, pipelines/demo/judge_weights."""
    extractor_weights: Path | None = None
    """File with the weights of inception. Default: download them."""
    batch_size: int = 50
    """Images per forward of the network, the decoder and the extractor."""
    num_workers: int | None = None
    """Worker processes. Default: one per GPU, or one per CPU on a machine without GPUs."""
    device: Device = "auto"
    """auto uses GPUs if the cluster has any."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(MeasuringOptions):
    """Sample a generator and measure the samples."""

    output: Path
    """Folder for the report."""
    model: str | None = None
    """Generator to evaluate: a folder, a URI, models:/name@alias or runs:/id/name."""
    samples: Path | None = None
    """File of samples to measure, instead of --model: .npz with arr_0, uint8 (N, H, W, 3), as in ADM's evaluation suite."""
    reference: str | None = None
    """Statistics of real images (.npz) from `meanflow reference`, ADM or MeanFlow's authors. Default: compute them from
    --train-images and write them next to the report."""
    train_images: str | None = None
    """Real images that the generator was trained on, in any format that `meanflow encode` reads. Or a latent dataset: the
    images from which it was encoded, found without listing them again."""
    held_out_images: str | None = None
    """Real images that the generator was not trained on, or a latent dataset, as for --train-images. Their distance is the
    lowest that samples can be expected to reach. They are also the baseline for diversity."""
    tracking_uri: str | None = None
    """MLflow address. Default: MLFLOW_TRACKING_URI, or else where the model was trained."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of sampling steps to evaluate."""
    guidance_scales: tuple[float, ...] = ()
    """Guidance scales to evaluate (improved MeanFlow and flow matching). Default: the generator's own."""
    guidance_intervals: tuple[tuple[float, float], ...] = ()
    """Guidance intervals to evaluate, each as two times "start end". Default: the generator's own."""
    solvers: tuple[Literal["euler", "heun"], ...] = ("euler",)
    """ODE solvers to evaluate; heun needs a flow matching generator."""
    num_samples: int = STANDARD_NUM_SAMPLES
    """Samples per setting."""
    labels: Labels = "random"
    """Class labels. random: uniformly random, as in the published FIDs of MeanFlow and DiT. balanced: sample i has class i
    mod num_classes; FID is then about 0.1 lower. training: random, each class as often as among --train-images; for data
    whose classes differ in size."""
    seed: int = 0
    """Base seed. Sample i uses seed * 2^32 + i, independently of the number of devices."""
    num_precision_recall: int = 10_000
    """Number of samples and reference images for precision and recall, at quadratic cost; and for the linear probe and the
    nearest training images in feature space. 0 skips all of them."""
    save_samples: Path | None = None
    """Folder for the samples of every setting as .npz (arr_0, uint8 NHWC), for other evaluation suites."""
    promote: bool = False
    """Make the evaluated version (models:/name@candidate) the champion if there is none, or if its distance at the first
    setting is better by more than two standard errors."""
    promote_below: float | None = None
    """With --promote: also make it the champion if its distance is below this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.promote_below is not None and not self.promote:
            raise ValueError("promote_below needs --promote")
        if (self.model is None) == (self.samples is None):
            raise ValueError("give either --model or --samples")
        if self.reference is None and self.train_images is None:
            raise ValueError("give --reference, or --train-images to compute a reference from")
        if self.labels == "training" and self.train_images is None:
            raise ValueError("labels training requires --train-images, whose classes are counted")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be one or more numbers of at least 1, but got {self.steps}")
        if self.num_samples < 3:
            raise ValueError(f"num_samples must be at least 3, but got {self.num_samples}")
        if self.num_precision_recall < 0:
            raise ValueError(f"num_precision_recall must be at least 0, but got {self.num_precision_recall}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31 - 1], but got {self.seed}")
        if not self.solvers:
            raise ValueError("solvers must be one or more of euler, heun, but got none")
        if not all(1.0 <= scale < float("inf") for scale in self.guidance_scales):
            raise ValueError(f"guidance_scales must be at least 1 (no guidance), but got {self.guidance_scales}")
        if not all(0.0 <= start <= end <= 1.0 for start, end in self.guidance_intervals):
            raise ValueError(
                f"guidance_intervals must be (start, end) with 0 <= start <= end <= 1, but got {self.guidance_intervals}"
            )
        slugs = [setting.slug for setting in self.settings]  # used in names of files and metrics
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"settings must differ, but steps, guidance and solvers give {', '.join(slugs)}")

    @property
    def settings(self) -> list[Setting]:
        """All combinations of steps, guidance and solvers."""
        return [
            Setting(num_steps=steps, guidance_scale=scale, guidance_interval=interval, solver=solver)
            for solver, scale, interval, steps in itertools.product(
                self.solvers, self.guidance_scales or (None,), self.guidance_intervals or (None,), self.steps
            )
        ]


@dataclass(frozen=True, kw_only=True)
class ReferenceJob(MeasuringOptions):
    """Compute reference statistics of real images, or of the decoded images of a latent dataset."""

    output: str
    """File to write (.npz): a path or a URI."""
    images: str | None = None
    """Images, in any format that `meanflow encode` reads. Or a latent dataset: the images from which it was encoded, found
    without listing them again."""
    data: str | None = None
    """Latent dataset to decode, instead of --images. Decoded images have the best quality that their autoencoder allows."""
    image_size: int = 256
    """Size of the crops of --images in pixels. Ignored for --data, because a latent dataset defines its own size."""
    num_features: int = 10_000
    """Feature vectors to keep with their labels, spread evenly over the images, for precision, recall and the linear probe.
    0 keeps none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.data is None):
            raise ValueError("give either --images or --data")
        if self.num_features < 0:
            raise ValueError(f"num_features must be at least 0, but got {self.num_features}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, but got {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class SideBySideJob:
    """Compare evaluation reports."""

    reports: tuple[str, ...]
    """Two or more reports: report folders, models:/name@alias or runs:/id. The first one is the baseline."""
    output: Path
    """Folder to write."""
    tracking_uri: str | None = None
    """MLflow address. Default: MLFLOW_TRACKING_URI."""
    allow_different_protocols: bool = False
    """Compare reports even if their protocols differ. The table lists the differences."""

    def __post_init__(self) -> None:
        if len(self.reports) < 2:
            raise ValueError(f"reports must be at least two, but got {len(self.reports)}")
