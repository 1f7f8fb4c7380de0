"""Options of the planner: the training run, and the machines to train on."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from meanflow_core.config import TrainingConfig
from pipelines.plan.hardware import Cluster

if TYPE_CHECKING:  # --help must be quick
    from pipelines.latents.manifest import NetworkSizes

MOMENT_BYTES = 2  # float16


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training run, independent of the machines. The default data are ImageNet's latents at 256 pixels.

    Raises ValueError for non-square latents and for counts below 1.
    """

    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The training configuration."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """Parallelism of `meanflow train`."""
    samples_per_pass: int | None = None
    """Largest micro-batch of a GPU. Default: the largest that fits."""
    images: int = 1_281_167
    """Number of training images."""
    latent_shape: tuple[int, int, int] = (4, 32, 32)
    """Channels, height and width of a latent."""
    classes: int = 1000
    """Number of classes."""

    def __post_init__(self) -> None:
        _, height, width = self.latent_shape
        if height != width:
            raise ValueError(f"latents must be square, but got {height}x{width}")
        for name in ("images", "classes", "samples_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")

    @property
    def sizes(self) -> "NetworkSizes":
        """The network's sizes that come from the data."""
        channels, size, _ = self.latent_shape
        return {"sample_size": size, "in_channels": channels, "num_classes": self.classes}

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's moments (mean and standard deviation), without those of its mirror image."""
        channels, height, width = self.latent_shape
        return MOMENT_BYTES * 2 * channels * height * width

    @property
    def latent_bytes(self) -> int:
        """Bytes of all moments. Labels, ids and Arrow's framing add about 0.3 % for ImageNet."""
        return self.images * self.image_bytes * (1 + self.config.mirror)

    def num_shards(self, num_gpus: int) -> int:
        """Devices over which FSDP2 shards parameters, gradients, optimiser state and averages; 1 under DDP."""
        return num_gpus if self.parallelism == "fsdp2" else 1


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What to train, and on which machines."""

    gpus: int = 8
    """Number of GPUs."""
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = field(default_factory=Cluster)
    """The machines."""
    epochs: float | None = None
    """Length of the training run in epochs, instead of --num-steps."""
    data: str | None = None
    """Latent dataset to plan for: replaces --images, --latent-shape and --classes."""
    workload: Annotated[Workload, tyro.conf.arg(name="")]
    """The training run."""
