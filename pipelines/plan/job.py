"""Options of the planner."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from meanflow_core.config import TrainingConfig

# ImageNet's training set, as latents of Stable Diffusion's autoencoder at 256 pixels.
IMAGENET_IMAGES, IMAGENET_CLASSES, IMAGENET_LATENTS = 1_281_167, 1000, (4, 32, 32)


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What to train, on which machines, and the measured rates of these machines."""

    gpus: int = 8
    """Number of GPUs."""
    gpus_per_node: int = 8
    """GPUs per node."""
    gpu: str = "h100"
    """Kind of GPU: h200, h100, a100, a100-40 or l4."""
    teraflops: float | None = None
    """Measured TFLOP/s per GPU over whole steps: model_flops_per_second of a trial run in MLflow / number of GPUs / 10^12.
    Default: assumed from the GPU's peak and memory bandwidth."""
    link_gbyte: float | None = None
    """GB/s in one direction that collectives reach between GPUs of a node. Default: three quarters of the data sheet's."""
    network_gbit: float = 100.0
    """Gbit/s in one direction that collectives reach between nodes. Plain TCP: 100; EFA and InfiniBand: 400 to 3,200."""
    storage_gbyte: float = 1.0
    """GB/s between a node and the storage of latents and checkpoints."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU hour. Default: no cost is printed."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """Parallelism of pipelines.train."""
    samples_per_pass: int | None = None
    """Largest micro-batch of a GPU. Default: the largest that fits."""
    epochs: float | None = None
    """Length of the training run in epochs, instead of --num-steps."""
    data: str | None = None
    """Latent dataset to plan for; replaces the next four options."""
    images: int = IMAGENET_IMAGES
    """Number of training images."""
    latent_shape: tuple[int, int, int] = IMAGENET_LATENTS
    """Channels, height and width of a latent."""
    classes: int = IMAGENET_CLASSES
    """Number of classes."""
    mirror: bool = True
    """Also keep the latents of mirror images."""
    json: Path | None = None
    """Write all figures to this JSON file."""
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The training config."""
