"""Options of an encoding job."""

from dataclasses import dataclass
from typing import Literal

import torch

from pipelines.cluster import Device
from pipelines.images.sources import Format

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Encode images into a latent dataset. The same command again finishes what is missing."""

    images: str
    """Class folders such as ImageNet's train/, Parquet or WebDataset files: a folder, or a pattern such as
    "data/train-*.parquet"; a path or URI."""
    output: str
    """Folder of the latent dataset: a path or URI."""
    vae: str
    """Autoencoder: a hub id such as stabilityai/sd-vae-ft-mse, or a folder."""
    format: Format | None = None
    """Of the images; told by looking unless named."""
    image_size: int = 256
    """Side of the square that images are cropped to, in pixels."""
    mirror: bool = True
    """Encode the mirror images too: a latent cannot be mirrored."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "tf32"
    """In which the autoencoder runs; tf32 is float32 where there are no tensor cores."""
    compile: bool = False
    """Compile the autoencoder (torch.compile)."""
    batch_size: int | None = None
    """Images per call of the autoencoder; chosen for the device unless given."""
    num_workers: int | None = None
    """Actors that encode; one per GPU, or one per CPU of machines without."""
    encoders_per_gpu: int = 1
    """Actors that share a GPU."""
    device: Device = "auto"
    """Encode on GPUs; where the cluster has some, unless said."""
    rows_per_shard: int = 512
    """Images per shard; fewer where the images are large."""
    max_rejected_fraction: float = 0.001
    """Share of unreadable images above which there is no dataset in the end, though all work is kept."""
    limit: int | None = None
    """Encode so many images, spread evenly over the source, for a trial."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "rows_per_shard", "num_workers", "encoders_per_gpu", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if not 0.0 <= self.max_rejected_fraction <= 1.0:
            raise ValueError(f"max_rejected_fraction must lie in [0, 1], but got {self.max_rejected_fraction}")
