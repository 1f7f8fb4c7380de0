"""Options of the command `meanflow judge`, and of the training loop that it shares with the demo."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class JudgeFit:
    """Settings of the training loop."""

    num_steps: int = 5_000
    """Optimiser steps."""
    batch_size: int = 64
    """Images per step, drawn with replacement."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW, with cosine decay to zero."""
    mirror: bool = False
    """Mirror half of the images. Leave it off for images whose class depends on left and right, such as digits."""
    max_shift: int = 0
    """Shift each image by up to this many pixels in both directions, and repeat the pixels at its edges."""
    noise: float = 0.03
    """Standard deviation of the noise added to pixels in [-1, 1]. It makes the judge insensitive to the artefacts of JPEG
    and of a decoder, which real images lack."""
    seed: int = 0
    """Seed of the initialisation, the order and the augmentation."""

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 1), ("batch_size", 1), ("max_shift", 0), ("noise", 0.0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but got {getattr(self, name)}")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate must be above 0, but got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class JudgeJob(JudgeFit):
    """Train a judge on your own images."""

    images: str
    """Training images, in any format that `meanflow encode` reads. Or a latent dataset: the images from which it was encoded,
    found without listing them again."""
    held_out_images: str
    """Images of the same classes for the held-out accuracy. They must not be among --images."""
    output: Path
    """Folder to write: config.json, diffusion_pytorch_model.safetensors, README.md (the model card)."""
    image_size: int = 64
    """Side of the square crops in pixels, which must be that of the generator's images."""
    num_images: int | None = None
    """Training images to read, spread evenly over the source. Default: all."""
    max_image_bytes: int = 4_000_000_000
    """Refuse more pixels than this. An image has 3 * image_size^2 bytes; reading them takes twice the memory."""
    max_shift: int = 2
    """Shift each image by up to this many pixels in both directions, and repeat the pixels at its edges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "num_images", "max_image_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")
