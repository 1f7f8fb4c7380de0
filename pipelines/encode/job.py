"""Options of an encoding job."""

from dataclasses import dataclass
from typing import Literal

from pipelines.cluster import Device
from pipelines.images.formats import Format
from pipelines.latents.pixels import PIXELS

Precision = Literal["float32", "tf32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Encode images into a latent dataset. Repeating the command completes an interrupted job."""

    images: str
    """Path or URI of the images: a folder, or a pattern of file names such as "data/train-*.parquet". The images are stored
    in class folders such as ImageNet's train/, in Parquet files or in WebDataset tars."""
    output: str
    """Folder of the latent dataset: a path or URI."""
    vae: str
    """Autoencoder: a hub id such as stabilityai/sd-vae-ft-mse, or the path or URI of a folder. pixels: no autoencoder; the
    generator works on pixels, which suits images of up to about 64 pixels. For further pixels with the same normalisation,
    such as more images of the same kind, give the vae folder of the first dataset."""
    pixel_factor: int = 1
    """With --vae pixels: side of the pixel blocks that become channels. 2 turns 3x32x32 into 12x16x16."""
    grey: bool | None = None
    """With --vae pixels: whether the images are grey, so that the generator has one image channel. Images with colours are
    then rejected. Default: yes for IDX files, otherwise no."""
    format: Format | None = None
    """Format of the images; default: detected from the file names."""
    image_size: int | None = None
    """Side of the square that images are cropped to, in pixels. Default: 256; required with --vae pixels."""
    mirror: bool = True
    """Also encode the mirror image of each image. Flipping a latent would not give the latent of the mirror image."""
    precision: Precision = "tf32"
    """Precision of the autoencoder; tf32 equals float32 on devices without tensor cores."""
    compile: bool = False
    """Compile the autoencoder with torch.compile."""
    batch_size: int | None = None
    """Images per forward of the autoencoder; default: chosen for the device."""
    num_workers: int | None = None
    """Encoding processes; default: one per GPU, or without GPUs one per CPU but one, which decodes images."""
    encoders_per_gpu: int = 1
    """Encoding processes that share a GPU."""
    device: Device = "auto"
    """Device to encode on; auto: GPUs if the cluster has any."""
    images_per_shard: int = 512
    """Images per shard; reduced automatically for large images."""
    max_rejected_fraction: float = 0.001
    """Fail if a larger fraction of the images is rejected, and more than two images. The encoded shards are kept."""
    limit: int | None = None
    """Encode only this many images; default: all. Folders and tars: evenly spaced over the source. Parquet: equally many of
    each class, from few row groups. Only these images, parts of tars or row groups are read, but a tar in an object store is
    streamed once to find its images."""

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "batch_size",
            "images_per_shard",
            "num_workers",
            "encoders_per_gpu",
            "limit",
            "pixel_factor",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if self.vae != PIXELS and (self.pixel_factor != 1 or self.grey is not None):
            raise ValueError(f"pixel_factor and grey need --vae {PIXELS}, but the autoencoder is {self.vae}")
        if self.vae == PIXELS and self.image_size is None:
            raise ValueError(f"--vae {PIXELS} requires --image-size, such as 28 for MNIST")
        if not 0.0 <= self.max_rejected_fraction <= 1.0:
            raise ValueError(f"max_rejected_fraction must be in [0, 1], but got {self.max_rejected_fraction}")

    @property
    def crop_size(self) -> int:
        """Side of the square that images are cropped to, in pixels."""
        return self.image_size or 256
