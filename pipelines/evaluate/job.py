"""Options of an evaluation."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.cluster import Device
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.evaluate.report import slug
from pipelines.evaluate.samples import Labels, SampleRule, Setting

FIELD_NUM_SAMPLES = 50_000


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Sample a generator and measure it."""

    output: Path
    """Folder for the report."""
    model: str | None = None
    """Generator: a folder, models:/name@alias or runs:/id/name."""
    samples: Path | None = None
    """Samples of somebody else in place of a generator: an .npz with arr_0, uint8 (N, H, W, 3), as ADM's suite has it."""
    reference: str | None = None
    """Statistics of real images, .npz: of pipelines.reference, ADM's, or the authors'. Made of --train-images unless
    given, and kept beside the report."""
    train_images: str | None = None
    """The real images that the generator learnt from, in any form that pipelines.encode reads."""
    held_out_images: str | None = None
    """Real images that it did not see: the floor, and what diversity is held against."""
    tracking_uri: str | None = None
    """MLflow address; MLFLOW_TRACKING_URI unless given. Without either, nothing is logged there."""
    extractor: str = str(SHIPPED_JUDGE)
    """inception, dinov2-vit-l-14 (extra `fid`), a TorchScript file, or a judge's folder: the demo's unless given."""
    extractor_weights: Path | None = None
    """File of the extractor's weights, where it is not to be downloaded."""
    ema_decay: float | None = None
    """Sample with the moving average of this decay, of the last checkpoint beside the generator's folder."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of equal steps to sample in."""
    guidance_scales: tuple[float, ...] = ()
    """omegas to sample with, for improved MeanFlow and flow matching; the generator's own unless given."""
    guidance_intervals: tuple[tuple[float, float], ...] = ()
    """Intervals "start end" to guide in; the generator's own unless given."""
    solvers: tuple[Literal["euler", "heun"], ...] = ("euler",)
    """How flow matching's equation is integrated."""
    num_samples: int = FIELD_NUM_SAMPLES
    """Samples per setting."""
    labels: Labels = "balanced"
    """balanced: sample i of class i mod num_classes; random: uniform, as MeanFlow's and DiT's figures are (FID some 0.1
    higher)."""
    seed: int = 0
    """Base seed: sample i's noise is that of seed * 2^32 + i, whatever the number of devices."""
    num_precision_recall: int = 10_000
    """Samples and reference images for precision and recall, which need every pair; 0 leaves them out."""
    save_samples: Path | None = None
    """Folder for an .npz of every setting's samples (arr_0, uint8 NHWC), for another evaluation suite."""
    batch_size: int = 50
    """Images per call of network, decoder and extractor."""
    num_workers: int | None = None
    """Processes that sample and measure; one per GPU, or one per CPU of a machine without."""
    device: Device = "auto"
    """Sample on GPUs; where the cluster has some, unless said."""
    cpu_threads: int = 1
    """Threads of a process on a CPU."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.samples is None):
            raise ValueError("give either --model or --samples")
        if self.reference is None and self.train_images is None:
            raise ValueError("give --reference, or --train-images to make one of")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must name numbers of at least 1, but got {self.steps}")
        if self.num_samples < 3 or min(self.batch_size, self.cpu_threads) < 1 or self.num_precision_recall < 0:
            raise ValueError(
                f"num_samples must be at least 3, batch_size and cpu_threads 1, num_precision_recall 0, but got "
                f"{self.num_samples}, {self.batch_size}, {self.cpu_threads}, {self.num_precision_recall}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, 2^31 - 1], but got {self.seed}")
        if not self.solvers:
            raise ValueError("solvers must name one of euler, heun, but got none")
        if not all(1.0 <= scale < float("inf") for scale in self.guidance_scales):
            raise ValueError(f"guidance_scales must be at least 1 (no guidance), but got {self.guidance_scales}")
        if not all(0.0 <= start <= end <= 1.0 for start, end in self.guidance_intervals):
            raise ValueError(
                f"guidance_intervals must be (start, end), 0 <= start <= end <= 1, but got {self.guidance_intervals}"
            )
        names = [slug(setting) for setting in self.settings]  # those of files and metrics
        if len(set(names)) < len(names):
            raise ValueError(f"steps, guidance and solvers must give settings that differ, but got {', '.join(names)}")

    @property
    def rule(self) -> SampleRule:
        """Which image sample i is."""
        return SampleRule(self.seed, self.labels)

    @property
    def settings(self) -> list[Setting]:
        """All ways of sampling that were asked for."""
        return [
            Setting(num_steps=steps, guidance_scale=scale, guidance_interval=interval, solver=solver)
            for solver, scale, interval, steps in itertools.product(
                self.solvers, self.guidance_scales or (None,), self.guidance_intervals or (None,), self.steps
            )
        ]
