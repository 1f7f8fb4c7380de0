"""Options of the check."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """Check a latent dataset, and show some of its samples in a figure."""

    data: str
    """Latent dataset: a path or URI."""
    images: str | None = None
    """Location of the images, if they have moved. Default: the location from which they were encoded. The dataset knows its
    images, so they are not listed again."""
    figure: Path = Path("build/check.png")
    """PNG to write: images, decoded latents, and decoded latents of the mirror images."""
    num_samples: int = 8
    """Number of samples in the figure, evenly spaced over the dataset."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, but got {self.num_samples}")
