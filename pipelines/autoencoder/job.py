"""Options of an autoencoder's training."""

from dataclasses import dataclass
from typing import Literal

from pipelines.cluster import Device
from pipelines.images.formats import Format

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderJob:
    """Train an autoencoder of diffusers on images. Repeating the command resumes an interrupted training."""

    images: str
    """Path or URI of the training images, in any format that `meanflow encode` reads."""
    held_out_images: str
    """Path or URI of images that are not trained on. PSNR and the reconstructions are of these."""
    output: str
    """Folder to write, shared by all nodes: a path or URI."""
    kind: Literal["kl", "dc", "tiny"] = "kl"
    """kl: AutoencoderKL. dc: AutoencoderDC, whose shortcuts past every change of resolution let it learn in a fraction of the
    time. tiny: AutoencoderTiny. The latents of the last two are points: they have no posterior."""
    format: Format | None = None
    """Format of the images; default: detected from the file names."""
    image_size: int = 256
    """Side of the square that images are cropped to, in pixels. A multiple of the factor."""
    factor: Literal[2, 4, 8, 16] = 8
    """Pixels per latent pixel along a side."""
    channels: int = 4
    """Latent channels. More of them keep more detail, but make the generator's task harder."""
    width: int = 32
    """Channels of the first and last level, a multiple of 8. Deeper levels of kl and dc have 2 and 4 times as many."""
    layers_per_block: int = 1
    """Residual blocks per level; the decoder of kl has one more."""
    attention: bool = False
    """Self-attention in the middle block of kl."""
    num_steps: int = 20_000
    """Optimiser steps."""
    batch_size: int = 32
    """Images per step over all workers: a multiple of their number."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, with linear warm-up and cosine decay to zero."""
    warm_up_steps: int = 200
    """Steps until the learning rate reaches its peak."""
    max_gradient_norm: float = 1.0
    """Norm to which gradients are clipped."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is published. 0: the weights of the last step."""
    perceptual_weight: float = 0.0
    """Weight of the distance in EfficientNet-Lite0's features, relative to the absolute error. Above 0 it requires the
    extra `efficientnet`."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of the posterior from a standard normal, per latent value. For dc and tiny, of half the
    latents' mean square, which is the divergence of a normal with deviation 1 around each."""
    mirror: bool = True
    """Also train on mirror images."""
    precision: Precision = "tf32"
    """Precision of the networks; tf32 equals float32 on devices without tensor cores."""
    seed: int = 0
    """Seed of the initialisation, the order of the images and the posterior noise."""
    num_held_out: int = 2_000
    """Maximum number of held-out images to measure, evenly spread over them."""
    num_workers: int | None = None
    """Training processes; default: one per GPU, or one on CPUs."""
    device: Device = "auto"
    """Device to train on; auto: GPUs if the cluster has any."""
    cpu_threads: int | None = None
    """CPU threads per worker; default: the machine's cores divided by its number of workers."""
    log_interval_steps: int = 100
    """Steps between logged losses."""
    checkpoint_interval_steps: int = 250
    """Steps between checkpoints and measurements of held-out images."""
    max_failures: int = 0
    """Maximum number of worker failures; after each, training restarts from the last checkpoint. -1: no limit."""
    experiment: str = "meanflow-ray"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        at_least_one = (
            "image_size", "channels", "layers_per_block", "num_steps", "batch_size", "num_held_out", "num_workers",
            "cpu_threads", "log_interval_steps", "checkpoint_interval_steps",
        )  # fmt: skip
        at_least_zero = ("warm_up_steps", "perceptual_weight", "kl_weight")
        minimums = {**dict.fromkeys(at_least_one, 1), **dict.fromkeys(at_least_zero, 0), "max_failures": -1}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, but got {value}")
        for name in ("learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, but got {getattr(self, name)}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), but got {self.ema_decay}")
        if self.attention and self.kind != "kl":
            raise ValueError(f"attention requires kind kl, but got {self.kind}")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width must be a multiple of 8, but got {self.width}")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size must be a multiple of the factor {self.factor}, but got {self.image_size}; the nearest are "
                f"{self.image_size // self.factor * self.factor} and {-(-self.image_size // self.factor) * self.factor}"
            )

    @property
    def workers(self) -> int:
        """`num_workers`, once the driver has replaced its default."""
        assert self.num_workers is not None, "the driver sets it when it knows the cluster"
        return self.num_workers
